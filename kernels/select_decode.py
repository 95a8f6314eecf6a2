"""Selection for decodes: which prompt tokens are revived.

The k best of the prompt are this step's selection; those of it that have no keys in the stage yet
are revived, best first, as far as the request's limit reaches. Being among the k best only depends
on a token's place in the order of all, so the revived are the head of the order of those without
keys: what lies above both lists' thresholds, and of what lies on the higher threshold the first.
"""

import torch

from vllm.triton_utils import tl

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Rows, Selection
from lazyllm_vllm.kernels.top_k import (
    BLOCK,
    MAX_SPLITS,
    NO_CANDIDATE,
    best_mask,
    clear_histogram,
    counts_before,
    counts_of,
    find_best,
    histogram_of,
    num_splits,
    split_bounds,
)


@step_jit
def _select_decode_kernel(
    histogram_ptr,
    thresholds_ptr,
    counts_ptr,
    rank_ptr,
    level_ptr,
    selected_ptr,
    place_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    num_prompt_ptr,
    revivable_ptr,
    active_ptr,
    prompt_keys_ptr,  # [requests, stages]
    counts_stride,
    index_ptr,
    first_row_ptr,
    limit_ptr,
    turn_tokens_ptr,
    num_keys_ptr,
    num_revived_ptr,
    row_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    num_turns,
    splits,
    stage,
    FIRST: tl.constexpr,
    LISTS: tl.constexpr,
    MARKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    split = tl.program_id(1)
    if tl.load(active_ptr + batch) == 0:
        return
    clear_histogram(histogram_of(histogram_ptr, batch), split, splits)
    num_prompt = tl.load(num_prompt_ptr + batch)
    start, end = split_bounds(0, num_prompt, split, splits, BLOCK)
    if start >= end:
        return
    counts = counts_of(counts_ptr, batch, MAX_SPLITS)
    threshold = tl.load(thresholds_ptr + batch * 4)
    ties = tl.load(thresholds_ptr + batch * 4 + 1)
    met, all_met = counts_before(counts, split, splits, 1, MAX_SPLITS)
    best = threshold
    if LISTS == 2:
        threshold_1 = tl.load(thresholds_ptr + batch * 4 + 2)
        is_turn = batch < num_turns
        best = tl.where(is_turn, threshold_1, tl.maximum(threshold, threshold_1))
        # On a threshold, a list takes its first ties; below its own, all.
        ties_0 = tl.where((threshold == best) & (is_turn == 0), ties, 0x7FFFFFFF)
        ties_1 = tl.where(threshold_1 == best, tl.load(thresholds_ptr + batch * 4 + 3), 0x7FFFFFFF)
        above, all_above = counts_before(counts, split, splits, 0, MAX_SPLITS)
        on, all_on = counts_before(counts, split, splits, 2, MAX_SPLITS)
        first_row = tl.load(first_row_ptr + batch)
        next_slot = tl.load(row_slot_ptr + batch) + 1  # after the current token's
        left_out = tl.where(is_turn, tl.load(limit_ptr + batch), 0)  # slots that wait for them
        seeing = tl.load(turn_tokens_ptr + batch, mask=is_turn, other=0)
        first_slot = next_slot - left_out - seeing
        revivable = tl.load(revivable_ptr + batch)
        # Prompt tokens with keys in the stage so far: slots less the tokens after the prompt.
        after_prompt = tl.load(row_position_ptr + batch).to(tl.int32) + 1 - num_prompt
        first_place = next_slot - left_out - after_prompt
        revived = 0
    table = block_table_ptr + batch * block_table_stride
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        at = state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        rank = tl.load(rank_ptr + at, mask=valid, other=-1)
        tie = (rank == threshold).to(tl.int32)
        order = met + tl.cumsum(tie, 0)
        if MARKS:
            taken = (rank > threshold) | ((tie != 0) & (order <= ties))
            marked = valid if FIRST else taken
            tl.store(selected_ptr + at, tl.where(taken, stage, 0), mask=marked)
        if LISTS == 2:
            here = (rank >= best) & (p < revivable)
            absent = tl.load(level_ptr + at, mask=here, other=127) == stage
            better = absent & (rank > best)
            level_with = (absent & (rank == best)).to(tl.int32)
            on_order = on + tl.cumsum(level_with, 0)
            first = (level_with != 0) & (order <= ties_0) & (on_order <= ties_1)
            # Rows: what is above the threshold in order of position, then what is on it.
            nth = tl.where(
                better, above + tl.cumsum(better.to(tl.int32), 0) - 1, all_above + on_order - 1
            )
            chosen = better | first
            tl.store(row_position_ptr + first_row + nth, p.to(tl.int64), mask=chosen)
            tl.store(row_request_ptr + first_row + nth, batch, mask=chosen)
            tl.store(row_slot_ptr + first_row + nth, first_slot + nth, mask=chosen)
            tl.store(level_ptr + at, stage + 1, mask=chosen)
            if FIRST:
                tl.store(place_ptr + at, first_place + nth, mask=chosen)
            above += tl.sum(better.to(tl.int32), 0)
            on += tl.sum(level_with, 0)
            revived += tl.sum(chosen.to(tl.int32), 0)
        met += tl.sum(tie, 0)
    if LISTS == 2:
        if revived > 0:
            keys_at = prompt_keys_ptr + tl.load(index_ptr + batch) * counts_stride + stage
            tl.atomic_add(keys_at, revived, sem="relaxed")
            if batch >= num_turns:  # the slots left for a turn's are counted
                tl.atomic_add(num_keys_ptr + batch, revived, sem="relaxed")
            tl.atomic_add(num_revived_ptr + batch, revived, sem="relaxed")


def select_decode_triton(s, stage, num_decodes, num_turns, rows, lists, marks):
    find_best(s, stage, range(num_decodes), lists, num_turns)
    splits = num_splits(num_decodes)
    state, search = s.state, s.search
    _select_decode_kernel[(num_decodes, splits)](
        search.histogram,
        search.thresholds,
        search.split_counts,
        state.rank,
        state.level,
        state.selected,
        state.place,
        *state.pages.kernel_args,
        s.num_prompt,
        s.revivable,
        s.active[stage],
        s.counts.prompt_keys,
        s.counts.stride,
        s.index,
        s.first_row,
        s.limit[stage],
        s.turn_tokens,
        rows.num_keys,
        rows.num_revived,
        rows.position,
        rows.request,
        rows.slot,
        num_turns,
        splits,
        stage,
        FIRST=stage == 1,
        LISTS=lists,
        MARKS=marks,
        MAX_SPLITS=MAX_SPLITS,
        BLOCK=BLOCK,
        **state.pages.kernel_constants,
    )


def _least_of_best(rank: torch.Tensor, k: int) -> int:
    """The k-th best rank, or the least if there are fewer; -1 if there is none."""
    best = rank.sort(descending=True).values[:k]
    return int(best[-1]) if len(best) else NO_CANDIDATE


def select_decode_reference(s, stage, num_decodes, num_turns, rows, lists, marks):
    state = s.state
    for i in range(num_decodes):
        if not s.active[stage, i]:
            continue
        index = int(s.index[i])
        at = state.prompt_at(i, s.num_prompt)
        rank = state.rank[at]
        best = best_mask(rank, int(s.counts.kept[index, stage]))
        if marks:
            marked = torch.ones_like(best) if stage == 1 else best
            state.selected[at[marked]] = stage * best[marked].int()
        if lists == 1:
            continue
        absent, limit = (rank >= 0) & (state.level[at] == stage), int(s.limit[stage, i])
        absent[int(s.revivable[i]) :] = False
        is_turn, without_keys = i < num_turns, rank[absent]
        if not is_turn:
            absent &= best & (rank >= s.least_revived)
        revived = min(int(absent.sum()), limit)
        chosen = best_mask(rank.where(absent, NO_CANDIDATE), revived).nonzero()[:, 0]
        # As the kernel orders them: what lies on the higher of both lists' thresholds goes last.
        higher = _least_of_best(without_keys, limit)
        if not is_turn:
            of_all = _least_of_best(rank[rank >= 0], int(s.counts.kept[index, stage]))
            higher = max(higher, of_all, s.least_revived)
        chosen = chosen[torch.sort((rank[chosen] == higher).int(), stable=True)[1]]
        first = int(s.first_row[i])
        mine = slice(first, first + revived)
        rows.position[mine] = chosen
        rows.request[mine] = i
        before = limit + int(s.turn_tokens[i]) if is_turn else 0
        first_slot = rows.slot[i] + 1 - before
        rows.slot[mine] = first_slot + torch.arange(revived, device=rank.device).int()
        state.level[at[chosen]] = stage + 1
        if stage == 1:
            had = int(s.counts.prompt_keys[index, stage])
            state.place[at[chosen]] = had + torch.arange(revived, device=rank.device).int()
        s.counts.prompt_keys[index, stage] += revived
        rows.num_revived[i] += revived
        if not is_turn:
            rows.num_keys[i] += revived


def select_decode(
    s: Selection,
    stage: int,
    num_decodes: int,
    num_turns: int,
    rows: Rows,
    lists: int,
    marks: bool,
) -> None:
    """Choose the tokens that the active decodes revive into ``stage``: of the first ``num_turns``
    (see ``begin_step``) as many as their limit, which must not be more than there are.

    Fills the revived part of ``rows`` (set up by ``begin_step``), adds to ``num_keys`` and
    ``num_revived``, and updates ``level``, ``place``, ``selected`` and the requests'
    ``prompt_keys``.

    Args:
        lists: 2: tokens may be revived; 1: the selection is only marked.
        marks: write ``selected``.
    """
    run = select_decode_triton if s.index.is_cuda else select_decode_reference
    run(s, stage, num_decodes, num_turns, rows, lists, marks)
