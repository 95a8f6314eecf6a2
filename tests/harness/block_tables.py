"""vLLM's two kernels for block tables, in NumPy. In Triton's interpreter they take two thirds of an
engine's time, if it has a table for each stage."""

import ctypes

import numpy as np

from vllm.v1.worker.gpu import block_table

from harness.in_numpy import replace


def install() -> None:
    """From now on, in this process and those forked from it."""
    kernels = {"_gather_block_tables_kernel": gather, "_compute_slot_mappings_kernel": map_slots}
    replace(block_table, kernels)


def _rows(pointer, num_rows: int, width: int) -> np.ndarray:
    """The ``[num_rows, width]`` int32 that are there."""
    at = ctypes.cast(int(pointer), ctypes.POINTER(ctypes.c_int32))
    return np.ctypeslib.as_array(at, (num_rows, width))


def gather(
    grid,
    batch_idx_to_req_idx,
    src_block_table_ptrs,
    dst_block_table_ptrs,
    block_table_strides,
    num_blocks_ptr,
    num_reqs,
    num_computed_tokens_ptr=None,
    sliding_window_reach_ptr=None,
    block_sizes_ptr=None,
    MASK_SLIDING_WINDOW=False,
    **others,
) -> None:
    num_groups, num_rows = grid
    requests = batch_idx_to_req_idx[:num_reqs].tolist()
    for group in range(num_groups):
        width = int(block_table_strides[group])
        source = _rows(src_block_table_ptrs[group], max(requests, default=0) + 1, width)
        rows = _rows(dst_block_table_ptrs[group], num_rows, width)
        rows[num_reqs:] = 0
        for row, request in zip(rows, requests):
            count = int(num_blocks_ptr[group, request])
            row[:count] = source[request, :count]
            reach = int(sliding_window_reach_ptr[group]) if MASK_SLIDING_WINDOW else 0
            if reach > 0:  # vLLM 0.33: blocks behind the window
                first = max(int(num_computed_tokens_ptr[request]) - reach, 0)
                row[: min(first // int(block_sizes_ptr[group]), count)] = 0


def map_slots(
    grid,
    max_num_tokens,
    idx_mapping,
    query_start_loc,
    pos,
    block_table_ptrs,
    block_table_strides,
    block_sizes,
    slot_mapping_enabled,
    slot_mappings_ptr,
    CP_SIZE,
    PAD_ID,
    **others,
) -> None:
    assert CP_SIZE == 1
    num_groups, num_requests = grid[0], grid[1] - 1
    requests, starts = idx_mapping[:num_requests].tolist(), query_start_loc.tolist()
    positions, slots = pos.numpy(), slot_mappings_ptr.numpy()
    for group in range(num_groups):
        width, size = int(block_table_strides[group]), int(block_sizes[group])
        table = _rows(block_table_ptrs[group], max(requests, default=0) + 1, width)
        for request, start, end in zip(requests, starts, starts[1:]):
            if request < 0 or not slot_mapping_enabled[group]:
                slots[group, start:end] = PAD_ID
                continue
            at = positions[start:end]
            slots[group, start:end] = table[request][at // size] * size + at % size
        slots[group, starts[num_requests] : max_num_tokens] = PAD_ID
