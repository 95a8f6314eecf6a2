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
    thresholds_ptr,
    counts_ptr,
    histogram_ptr,
    rank_ptr,
    level_ptr,
    place_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    active_ptr,
    num_prompt_ptr,
    choice_begin_ptr,
    choice_first_ptr,
    choice_end_ptr,
    choice_before_ptr,  # [stages, max batch]
    choice_count_ptr,
    max_batch,
    num_stages,
    index_ptr,
    before_start_ptr,  # [prefills + 1], first row of each prefill in the stage before
    before_first_ptr,  # [prefills], and its slot
    before_shift_ptr,  # [prefills]
    before_base,
    after_start_ptr,  # [prefills + 1], and in the stage
    after_first_ptr,
    after_shift_ptr,
    after_base,
    row_position_ptr,  # rows of the stage, written
    row_request_ptr,
    row_slot_ptr,
    row_source_ptr,
    first_request,
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
    batch = first_request + nth
    request = tl.where(tl.load(index_ptr + batch) >= 0, batch, -1)
    before = before_base + tl.load(before_start_ptr + nth)
    before_first = tl.load(before_first_ptr + nth)
    after = after_base + tl.load(after_start_ptr + nth)
    after_first = tl.load(after_first_ptr + nth)
    num_rows = tl.load(after_start_ptr + nth + 1) - tl.load(after_start_ptr + nth)

    if tl.load(active_ptr + batch) == 0:
        shift = tl.load(after_shift_ptr + nth)
        before_position = before_first - tl.load(before_shift_ptr + nth)
        start, end = split_bounds(0, num_rows, split, splits, BLOCK)
        for j0 in range(start, end, BLOCK):
            j = j0 + tl.arange(0, BLOCK)
            valid = j < end
            slot = after_first + j
            position = slot - shift
            back = position - before_position
            tl.store(row_position_ptr + after + j, position.to(tl.int64), mask=valid)
            tl.store(row_request_ptr + after + j, request, mask=valid)
            tl.store(row_slot_ptr + after + j, slot, mask=valid)
            source = tl.where((back >= 0) & (request >= 0), before + back, -1)
            tl.store(row_source_ptr + after + j, source, mask=valid)
        return

    clear_histogram(histogram_of(histogram_ptr, batch), split, splits)
    table = block_table_ptr + batch * block_table_stride
    threshold = tl.load(thresholds_ptr + batch * 4)
    ties = tl.load(thresholds_ptr + batch * 4 + 1)
    counts = counts_of(counts_ptr, batch, MAX_SPLITS)
    num_above, all_above = counts_before(counts, split, splits, 0, MAX_SPLITS)
    met, all_met = counts_before(counts, split, splits, 1, MAX_SPLITS)
    num_seen, all_seen = counts_before(counts, split, splits, 2, MAX_SPLITS)
    num_kept = num_above + tl.minimum(met, ties)
    choice = choice_before_ptr + stage * max_batch + batch
    slots_before = tl.load(choice)
    num_seen += tl.load(choice - max_batch)
    first, last = tl.load(choice_first_ptr + batch), tl.load(choice_end_ptr + batch)
    if (stage == 1) & (split == 0):
        # What is not chosen among has keys in every stage, and what comes after has its place.
        next_place = slots_before + tl.load(choice_count_ptr + stage * max_batch + batch)
        begin, num_prompt = tl.load(choice_begin_ptr + batch), tl.load(num_prompt_ptr + batch)
        for p0 in range(begin, num_prompt - (last - first), BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            valid = p < num_prompt - (last - first)
            p = tl.where(p < first, p, p + last - first)
            at = state_at(
                table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
            )
            tl.store(level_ptr + at, num_stages, mask=valid)
            tl.store(place_ptr + at, next_place + p - last, mask=valid & (p >= last))
    start, end = split_bounds(first, last, split, splits, BLOCK)
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
        back = num_seen + tl.cumsum(candidate.to(tl.int32), 0) - 1 - before_first
        slot = slots_before + num_kept + tl.cumsum(kept.to(tl.int32), 0) - 1
        j = slot - after_first
        here = kept & (j >= 0) & (j < num_rows)
        tl.store(row_position_ptr + after + j, p.to(tl.int64), mask=here)
        tl.store(row_request_ptr + after + j, request, mask=here)
        tl.store(row_slot_ptr + after + j, slot, mask=here)
        tl.store(row_source_ptr + after + j, tl.where(back >= 0, before + back, -1), mask=here)
        tl.store(level_ptr + at, tl.where(kept, stage + 1, stage), mask=candidate)
        tl.store(place_ptr + at, slot, mask=kept & (stage == 1))
        met += tl.sum(tie, 0)
        num_seen += tl.sum(candidate.to(tl.int32), 0)
        num_kept += tl.sum(kept.to(tl.int32), 0)


def select_prefill_triton(s, stage, batch, before, after, searches):
    if searches:
        find_best(s, stage, batch, lists=1, prefill=True)
    splits = num_splits(len(batch))
    state, search, rows, choice = s.state, s.search, after.rows, s.choice
    _select_prefill_kernel[(len(batch), splits)](
        search.thresholds,
        search.split_counts,
        search.histogram,
        state.rank,
        state.level,
        state.place,
        *state.pages.kernel_args,
        s.active[stage],
        s.num_prompt,
        choice.begin,
        choice.first,
        choice.end,
        choice.before,
        choice.count,
        choice.before.stride(0),
        s.num_stages,
        s.index,
        before.start,
        before.first,
        before.shift,
        before.base,
        after.segments.start,
        after.segments.first,
        after.segments.shift,
        after.segments.base,
        rows.position,
        rows.request,
        rows.slot,
        rows.source,
        batch.start,
        splits,
        stage,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK=BLOCK,
        **state.pages.kernel_constants,
    )


def select_prefill_reference(s, stage, batch, before, after, searches):
    rows, state, choice = after.rows, s.state, s.choice
    for nth, i in enumerate(batch):
        new, first = after.segments.of(nth), int(after.segments.first[nth])
        slot = torch.arange(first, first + new.stop - new.start, device=rows.slot.device)
        position = slot - after.segments.shift[nth]
        before_slot = position + before.shift[nth]
        if s.active[stage, i]:
            begin, first, end = (int(x[i]) for x in (choice.begin, choice.first, choice.end))
            had, count = int(choice.before[stage, i]), int(choice.count[stage, i])
            whole = state.prompt_at(i, s.num_prompt)
            at = whole[first:end]
            rank = state.rank[at]
            candidates = (rank >= 0).nonzero()[:, 0]
            kept = best_mask(rank, count)
            state.level[at[candidates]] = stage + kept[candidates].int()
            if stage == 1:
                places = torch.arange(had, had + int(kept.sum()), device=at.device)
                state.place[at[kept]] = places.int()
                others = torch.cat([whole[begin:first], whole[end:]])
                state.level[others] = s.num_stages
                places = torch.arange(len(whole) - end, device=at.device)
                state.place[whole[end:]] = (had + count + places).int()
            before_slot = kept[candidates].nonzero()[:, 0][slot - had]
            position = first + candidates[before_slot]
            before_slot = before_slot + choice.before[stage - 1, i]
        back = before_slot - int(before.first[nth])
        rows.position[new] = position
        is_there = s.index[i] >= 0
        rows.request[new] = i if is_there else -1
        rows.slot[new] = slot.int()
        rows.source[new] = (before.of(nth).start + back).where((back >= 0) & is_there, -1).int()


def select_prefill(
    s: Selection,
    stage: int,
    batch: range,
    before: Segments,
    after: PrefillRows,
    searches: bool,
) -> None:
    """Choose each prefill's rows of ``stage``, or a part of them: fills those that
    ``after.segments`` names, and, of prompts that are pruned now (``s.active``), ``level`` and
    ``place`` of the tokens that ``s.choice`` is about.

    Args:
        batch: the prefills' batch indices. Of one that is not pruned now the rows are tokens side
            by side.
        before: rows of the stage before that are at hand; the others come from where they are
            parked. Rows of no request come from nowhere.
        searches: whether the best are yet to be found among the ranks; False: an earlier part was
            chosen at this boundary, or none is pruned.
    """
    run = select_prefill_triton if s.index.is_cuda else select_prefill_reference
    run(s, stage, batch, before, after, searches)
