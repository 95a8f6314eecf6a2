"""Selection for prefills: which rows of the stage before go on, in order of position."""

from dataclasses import dataclass

import torch

from vllm.triton_utils import tl

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Rows, Segments, Selection
from lazyllm_vllm.kernels.top_k import (
    BLOCK,
    MAX_SPLITS,
    best_mask,
    clear_histogram,
    counts_before,
    counts_of,
    find_best,
    histogram_of,
    num_splits,
    split_bounds,
)


@dataclass(frozen=True)
class PrefillRows:
    """The rows of one stage, and which of them are whose prefill's."""

    rows: Rows
    segments: Segments


@step_jit
def _select_prefill_kernel(
    histogram_ptr,
    thresholds_ptr,
    counts_ptr,
    rank_ptr,
    level_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    is_pruned_ptr,
    active_ptr,
    num_prompt_ptr,
    index_ptr,
    before_start_ptr,  # [prefills + 1], first row of each prefill in the stage before
    before_position_ptr,  # [rows of the stage before] int64
    before_base,
    after_start_ptr,  # [prefills + 1], and in the stage
    after_base,
    row_position_ptr,  # rows of the stage, written
    row_request_ptr,
    row_slot_ptr,
    row_source_ptr,
    num_decodes,
    splits,
    stage,
    MAX_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    nth = tl.program_id(0)
    split = tl.program_id(1)
    batch = num_decodes + nth
    request = tl.where(tl.load(index_ptr + batch) >= 0, batch, -1)
    table = block_table_ptr + batch * block_table_stride
    before = before_base + tl.load(before_start_ptr + nth)
    after = after_base + tl.load(after_start_ptr + nth)

    if tl.load(active_ptr + batch) == 0:  # every row goes on
        is_pruned = tl.load(is_pruned_ptr + batch) != 0
        num_rows = tl.load(before_start_ptr + nth + 1) - tl.load(before_start_ptr + nth)
        start, end = split_bounds(num_rows, split, splits, BLOCK)
        for j0 in range(start, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            valid = j < end
            position = tl.load(before_position_ptr + before + j, mask=valid, other=0)
            tl.store(row_position_ptr + after + j, position, mask=valid)
            tl.store(row_request_ptr + after + j, request, mask=valid)
            tl.store(row_slot_ptr + after + j, j, mask=valid)
            tl.store(row_source_ptr + after + j, before + j, mask=valid)
            if is_pruned:
                at = state_at(
                    table,
                    position.to(tl.int32),
                    valid,
                    page_stride,
                    block_stride,
                    PAGES,
                    PER_PAGE,
                    SLOT_SIZE,
                    PER_SLOT,
                )
                tl.store(level_ptr + at, stage + 1, mask=valid)
        return

    clear_histogram(histogram_of(histogram_ptr, batch), split, splits)
    threshold = tl.load(thresholds_ptr + batch * 4)
    ties = tl.load(thresholds_ptr + batch * 4 + 1)
    counts = counts_of(counts_ptr, batch, MAX_SPLITS)
    num_above, all_above = counts_before(counts, split, splits, 0, MAX_SPLITS)
    met, all_met = counts_before(counts, split, splits, 1, MAX_SPLITS)
    num_seen, all_seen = counts_before(counts, split, splits, 2, MAX_SPLITS)
    num_kept = num_above + tl.minimum(met, ties)
    start, end = split_bounds(tl.load(num_prompt_ptr + batch), split, splits, BLOCK)
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        at = state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        rank = tl.load(rank_ptr + at, mask=valid, other=-1)
        candidate = rank >= 0
        tie = (rank == threshold).to(tl.int32)
        kept = (rank > threshold) | ((tie != 0) & (met + tl.cumsum(tie, 0) <= ties))
        source = before + num_seen + tl.cumsum(candidate.to(tl.int32), 0) - 1
        slot = num_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(row_position_ptr + after + slot, p.to(tl.int64), mask=kept)
        tl.store(row_request_ptr + after + slot, request, mask=kept)
        tl.store(row_slot_ptr + after + slot, slot, mask=kept)
        tl.store(row_source_ptr + after + slot, source, mask=kept)
        tl.store(level_ptr + at, tl.where(kept, stage + 1, stage), mask=candidate)
        met += tl.sum(tie, 0)
        num_seen += tl.sum(candidate.to(tl.int32), 0)
        num_kept += tl.sum(kept.to(tl.int32), 0)


def select_prefill_triton(s, stage, num_decodes, before, after, any_active):
    num_prefills = after.segments.count
    if any_active:
        find_best(s, stage, range(num_decodes, num_decodes + num_prefills), lists=1)
    splits = num_splits(num_prefills)
    state, search, rows = s.state, s.search, after.rows
    _select_prefill_kernel[(num_prefills, splits)](
        search.histogram,
        search.thresholds,
        search.split_counts,
        state.rank,
        state.level,
        *state.pages.kernel_args,
        s.is_pruned,
        s.active[stage],
        s.num_prompt,
        s.index,
        before.segments.start,
        before.rows.position,
        before.segments.base,
        after.segments.start,
        after.segments.base,
        rows.position,
        rows.request,
        rows.slot,
        rows.source,
        num_decodes,
        splits,
        stage,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK=BLOCK,
        **state.pages.kernel_constants,
    )


def select_prefill_reference(s, stage, num_decodes, before, after, any_active):
    rows = after.rows
    for nth in range(after.segments.count):
        i = num_decodes + nth
        old, new = before.segments.of(nth), after.segments.of(nth)
        position = before.rows.position[old]
        kept = torch.ones_like(position, dtype=torch.bool)
        if s.active[stage, i]:
            rank = s.state.rank[s.state.prompt_at(i, s.num_prompt)]
            kept = best_mask(rank, new.stop - new.start)[position]
        rows.position[new] = position[kept]
        rows.request[new] = i if s.index[i] >= 0 else -1
        rows.slot[new] = torch.arange(new.stop - new.start, device=rows.slot.device).int()
        rows.source[new] = (old.start + kept.nonzero()[:, 0]).int()
        if s.is_pruned[i]:
            s.state.level[s.state.at(i, position)] = stage + kept.int()


def select_prefill(
    s: Selection,
    stage: int,
    num_decodes: int,
    before: PrefillRows,
    after: PrefillRows,
    any_active: bool,
) -> None:
    """Choose each prefill's rows of ``stage``: fills their part of ``after.rows`` and ``level``.

    Args:
        num_decodes: requests before the prefills in the batch.
        before: rows of the stage before, of which ``position`` is read.
        any_active: whether a token of any of them is dropped here; their tokens are ranked, then.
    """
    run = select_prefill_triton if s.index.is_cuda else select_prefill_reference
    run(s, stage, num_decodes, before, after, any_active)
