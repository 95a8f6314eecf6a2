"""Selection for prefills: which rows of the stage before go on, in order of position."""

import torch

from vllm.triton_utils import tl

from lazyllm_vllm.kernels.attention import physical_slots
from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.state import PrefillMove, Rows, Selection
from lazyllm_vllm.kernels.top_k import (
    BLOCK,
    MAX_SPLITS,
    best_mask,
    clear_histogram,
    counts_before,
    counts_of,
    find_best,
    histogram_of,
    home_slot,
    home_slots,
    num_splits,
    split_bounds,
)


@step_jit
def _select_prefill_kernel(
    histogram_ptr,
    found_ptr,
    counts_ptr,
    token_key_ptr,
    level_ptr,
    position_table_ptr,
    position_table_stride,
    is_pruned_ptr,
    active_ptr,
    src_start_ptr,  # [prefills + 1] rows of the stage before, within its prefill rows
    dst_start_ptr,  # [prefills + 1] rows of the stage
    src_position_ptr,  # [rows of the stage before] int64
    dst_row_ptr,  # [rows of the stage before]
    src_request_ptr,
    row_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    num_prompt_ptr,
    req_index_ptr,
    src_base,
    dst_base,
    num_decodes,
    splits,
    stage,
    MAX_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    nth = tl.program_id(0)
    split = tl.program_id(1)
    batch = num_decodes + nth
    real = tl.load(req_index_ptr + batch) >= 0
    request = tl.where(real, batch, -1)
    table = position_table_ptr + batch * position_table_stride
    src = src_base + tl.load(src_start_ptr + nth)
    dst = dst_base + tl.load(dst_start_ptr + nth)

    if tl.load(active_ptr + batch) == 0:  # every row goes on
        is_pruned = tl.load(is_pruned_ptr + batch) != 0
        num_src = tl.load(src_start_ptr + nth + 1) - tl.load(src_start_ptr + nth)
        start, end = split_bounds(num_src, split, splits, BLOCK)
        for j0 in range(start, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            valid = j < end
            position = tl.load(src_position_ptr + src + j, mask=valid, other=0)
            tl.store(dst_row_ptr + src + j, dst + j, mask=valid)
            tl.store(src_request_ptr + src + j, request, mask=valid)
            tl.store(row_position_ptr + dst + j, position, mask=valid)
            tl.store(row_request_ptr + dst + j, request, mask=valid)
            tl.store(row_slot_ptr + dst + j, j, mask=valid)
            if is_pruned:
                home = home_slot(table, position, valid, BLOCK_SIZE)
                tl.store(level_ptr + home, stage + 1, mask=valid)
        return

    clear_histogram(histogram_of(histogram_ptr, batch), split, splits)
    threshold = tl.load(found_ptr + batch * 4)
    ties = tl.load(found_ptr + batch * 4 + 1)
    counts = counts_of(counts_ptr, batch, MAX_SPLITS)
    num_above, all_above = counts_before(counts, split, splits, 0, MAX_SPLITS)
    met, all_met = counts_before(counts, split, splits, 1, MAX_SPLITS)
    num_seen, all_seen = counts_before(counts, split, splits, 2, MAX_SPLITS)
    num_kept = num_above + tl.minimum(met, ties)
    start, end = split_bounds(tl.load(num_prompt_ptr + batch), split, splits, BLOCK)
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        home = home_slot(table, p, valid, BLOCK_SIZE)
        key = tl.load(token_key_ptr + home, mask=valid, other=-1)
        candidate = key >= 0
        tie = (key == threshold).to(tl.int32)
        kept = (key > threshold) | ((tie != 0) & (met + tl.cumsum(tie, 0) <= ties))
        from_row = src + num_seen + tl.cumsum(candidate.to(tl.int32), 0) - 1
        slot = num_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(dst_row_ptr + from_row, tl.where(kept, dst + slot, -1), mask=candidate)
        tl.store(src_request_ptr + from_row, request, mask=candidate)
        tl.store(row_position_ptr + dst + slot, p.to(tl.int64), mask=kept)
        tl.store(row_request_ptr + dst + slot, request, mask=kept)
        tl.store(row_slot_ptr + dst + slot, slot, mask=kept)
        level = tl.where(kept, stage + 1, stage).to(tl.int8)
        tl.store(level_ptr + home, level, mask=candidate)
        met += tl.sum(tie, 0)
        num_seen += tl.sum(candidate.to(tl.int32), 0)
        num_kept += tl.sum(kept.to(tl.int32), 0)


def select_prefill_triton(s, rows, src, num_decodes, stage, any_active):
    num_prefills = len(src.start) - 1
    table = s.position_table
    if any_active:
        find_best(s, num_decodes, num_prefills, stage, lists=1)
    splits = num_splits(num_prefills)
    _select_prefill_kernel[(num_prefills, splits)](
        s.histogram, s.found, s.counts, s.token_key, s.level, table, table.stride(0), s.is_pruned,
        s.active[stage], src.start, src.dst_start, src.position, src.dst_row, src.request,
        rows.position, rows.request, rows.slot, s.num_prompt, s.req_index, src.base, src.dst_base,
        num_decodes, splits, stage, MAX_SPLITS=MAX_SPLITS, BLOCK_SIZE=s.block_size,
        BLOCK=BLOCK,
    )  # fmt: skip


def select_prefill_reference(s, rows, src, num_decodes, stage, any_active):
    for nth in range(len(src.start) - 1):
        i = num_decodes + nth
        request = i if s.req_index[i] >= 0 else -1
        src0, src1 = (src.base + int(x) for x in src.start[nth : nth + 2])
        dst0, dst1 = (src.dst_base + int(x) for x in src.dst_start[nth : nth + 2])
        src.request[src0:src1] = request
        rows.request[dst0:dst1] = request
        rows.slot[dst0:dst1] = torch.arange(dst1 - dst0, device=rows.slot.device)
        position = src.position[src0:src1]
        kept = torch.ones_like(position, dtype=torch.bool)
        if s.active[stage, i]:
            home = home_slots(s, i)
            kept = best_mask(s.token_key[home], dst1 - dst0)[position]
        rows.position[dst0:dst1] = position[kept]
        src.dst_row[src0:src1] = (dst0 + kept.cumsum(0) - 1).where(kept, -1).to(torch.int32)
        if s.is_pruned[i]:
            home = physical_slots(s.position_table[i], position, s.block_size)
            s.level[home] = (stage + kept.to(torch.int8)).to(torch.int8)


def select_prefill(
    s: Selection, rows: Rows, src: PrefillMove, num_decodes: int, stage: int, any_active: bool
) -> None:
    """Choose each prefill's rows of ``stage``: fills their part of ``rows``, ``src.dst_row``,
    ``src.request`` and ``level``.

    Args:
        any_active: whether a token of any of them is dropped here; their tokens are ranked, then.
    """
    run = select_prefill_triton if s.token_key.is_cuda else select_prefill_reference
    run(s, rows, src, num_decodes, stage, any_active)
