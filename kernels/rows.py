"""Whose rows they are, and where their keys go: per-batch state, physical slots, the write."""

import torch

from vllm.triton_utils import tl, triton


@triton.jit
def _load_batch_kernel(
    num_prompt_ptr, is_pruned_ptr, req_index_ptr, table_ptr, table_stride, num_stages
):
    batch = tl.program_id(0)
    index = tl.load(req_index_ptr + batch)
    num_prompt = 0
    pruned = 0
    if index >= 0:
        state = table_ptr + index * table_stride
        num_prompt = tl.load(state)
        pruned = (tl.load(state + num_stages) < num_prompt).to(tl.int32)
    tl.store(num_prompt_ptr + batch, num_prompt)
    tl.store(is_pruned_ptr + batch, pruned)


def load_batch_triton(num_prompt, is_pruned, req_index, table, num_stages, batch):
    _load_batch_kernel[(batch,)](
        num_prompt, is_pruned, req_index, table, table.stride(0), num_stages, num_warps=1
    )


def load_batch_reference(num_prompt, is_pruned, req_index, table, num_stages, batch):
    real = req_index[:batch] >= 0
    state = table[req_index[:batch].clamp(min=0).long()]
    num_prompt[:batch] = state[:, 0] * real
    is_pruned[:batch] = (state[:, num_stages] < state[:, 0]) & real


def load_batch(
    num_prompt: torch.Tensor,
    is_pruned: torch.Tensor,
    req_index: torch.Tensor,
    table: torch.Tensor,
    num_stages: int,
    batch: int,
) -> None:
    """Write ``num_prompt`` and ``is_pruned`` (``[batch]`` int32) of the requests at ``req_index``
    (-1: none); a request is pruned if its last stage keeps less than its prompt."""
    run = load_batch_triton if table.is_cuda else load_batch_reference
    run(num_prompt, is_pruned, req_index, table, num_stages, batch)


@triton.jit
def _place_kernel(
    slot_mapping_ptr,
    slot_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    row_position_ptr,
    block_table_ptr,
    block_table_stride,
    num_rows,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    request = tl.load(row_request_ptr + row, mask=valid, other=-1)
    placed = valid & (request >= 0)
    slot = tl.load(row_slot_ptr + row, mask=placed, other=0)
    block = tl.load(
        block_table_ptr + request * block_table_stride + slot // BLOCK_SIZE, mask=placed, other=0
    ).to(tl.int64)
    physical = block * BLOCK_SIZE + slot % BLOCK_SIZE
    position = tl.load(row_position_ptr + row, mask=placed, other=0)
    tl.store(slot_mapping_ptr + row, tl.where(placed, physical, -1), mask=valid)
    tl.store(slot_position_ptr + physical, position.to(tl.int32), mask=placed)


def place_rows_triton(slot_mapping, slot_position, rows, block_table, num_rows, block_size):
    _place_kernel[(triton.cdiv(num_rows, 256),)](
        slot_mapping, slot_position, rows.request, rows.slot, rows.position,
        block_table, block_table.stride(0), num_rows, BLOCK_SIZE=block_size, BLOCK=256,
    )  # fmt: skip


def place_rows_reference(slot_mapping, slot_position, rows, block_table, num_rows, block_size):
    request = rows.request[:num_rows].long()
    slot_mapping[:num_rows] = -1
    at = (request >= 0).nonzero()[:, 0]
    slot = rows.slot[at].long()
    physical = block_table[request[at], slot // block_size].long() * block_size + slot % block_size
    slot_mapping[at] = physical
    slot_position[physical] = rows.position[at].to(torch.int32)


def place_rows(slot_mapping, slot_position, rows, block_table, num_rows, block_size) -> None:
    """Turn each row's slot in a stage into its physical slot in one of the stage's groups.

    Args:
        slot_mapping: ``[rows]`` int64, written; -1 for unused rows.
        slot_position: ``[physical slots]`` int32, written: the position of the key put there.
        rows: ``kernels.state.Rows`` of the stage.
        block_table: ``[batch, width]`` int32 of the group.
    """
    run = place_rows_triton if slot_mapping.is_cuda else place_rows_reference
    run(slot_mapping, slot_position, rows, block_table, num_rows, block_size)


@triton.jit
def _write_kv_kernel(
    kv_ptr,
    kv_stride_block,
    kv_stride_head,
    kv_stride_slot,
    k_ptr,
    k_stride_row,
    v_ptr,
    v_stride_row,
    slot_mapping_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + row)
    if slot < 0:
        return
    i = tl.arange(0, PAD)
    valid = i < NUM_HEADS * HEAD_DIM
    at = (
        kv_ptr
        + (slot // BLOCK_SIZE) * kv_stride_block
        + (slot % BLOCK_SIZE) * kv_stride_slot
        + (i // HEAD_DIM) * kv_stride_head
        + i % HEAD_DIM
    )
    tl.store(at, tl.load(k_ptr + row * k_stride_row + i, mask=valid), mask=valid)
    tl.store(at + HEAD_DIM, tl.load(v_ptr + row * v_stride_row + i, mask=valid), mask=valid)


def write_kv_triton(kv_cache, k, v, slot_mapping):
    num_heads, head_dim = k.shape[1:]
    assert k.stride(1) == v.stride(1) == head_dim and kv_cache.stride(3) == 1
    _write_kv_kernel[(len(slot_mapping),)](
        kv_cache, kv_cache.stride(0), kv_cache.stride(1), kv_cache.stride(2),
        k, k.stride(0), v, v.stride(0), slot_mapping,
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, PAD=triton.next_power_of_2(num_heads * head_dim),
        BLOCK_SIZE=kv_cache.shape[2],
    )  # fmt: skip


def write_kv_reference(kv_cache, k, v, slot_mapping):
    at = (slot_mapping >= 0).nonzero()[:, 0]
    slot = slot_mapping[at]
    block_size = kv_cache.shape[2]
    kv_cache[slot // block_size, :, slot % block_size] = torch.cat([k[at], v[at]], -1)


def write_kv(kv_cache, k, v, slot_mapping) -> None:
    """Store keys and values (``[rows, kv_heads, head_dim]``) at physical slots (``[rows]`` int64,
    -1: nowhere) of ``[blocks, kv_heads, block_size, 2 * head_dim]``."""
    run = write_kv_triton if k.is_cuda else write_kv_reference
    run(kv_cache, k, v, slot_mapping)
