"""Selection for decodes: which prompt tokens are revived.

The k best of the prompt are this step's selection; those of it that have no keys in the stage yet
are revived, best first, as far as the request's limit reaches. Being among the k best only depends
on a token's place in the order of all, so the revived are the head of the order of those without
keys: what lies above both lists' thresholds, and of what lies on the higher threshold the first.
"""

import torch

from vllm.triton_utils import tl

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.state import Rows, Selection
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
    home_slot,
    home_slots,
    num_splits,
    split_bounds,
)


@step_jit
def _select_decode_kernel(
    histogram_ptr,
    found_ptr,
    counts_ptr,
    token_key_ptr,
    level_ptr,
    selected_ptr,
    position_table_ptr,
    position_table_stride,
    num_prompt_ptr,
    active_ptr,
    table_ptr,  # [requests, 1 + 3 * stages]: num_prompt, kept, room, prompt_keys by stage
    table_stride,
    req_index_ptr,
    share_ptr,
    key_len_ptr,
    num_revived_ptr,
    row_position_ptr,
    row_request_ptr,
    row_slot_ptr,
    num_decodes,
    num_stages,
    splits,
    stage,
    FIRST: tl.constexpr,
    LISTS: tl.constexpr,
    MARKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0)
    split = tl.program_id(1)
    if tl.load(active_ptr + batch) == 0:
        return
    clear_histogram(histogram_of(histogram_ptr, batch), split, splits)
    start, end = split_bounds(tl.load(num_prompt_ptr + batch), split, splits, BLOCK)
    if start >= end:
        return
    counts = counts_of(counts_ptr, batch, MAX_SPLITS)
    threshold = tl.load(found_ptr + batch * 4)
    ties = tl.load(found_ptr + batch * 4 + 1)
    met, all_met = counts_before(counts, split, splits, 1, MAX_SPLITS)
    best = threshold
    if LISTS == 2:
        threshold_1 = tl.load(found_ptr + batch * 4 + 2)
        best = tl.maximum(threshold, threshold_1)
        # On a threshold, a list takes its first ties; below its own, all.
        ties_0 = tl.where(threshold == best, ties, 0x7FFFFFFF)
        ties_1 = tl.where(threshold_1 == best, tl.load(found_ptr + batch * 4 + 3), 0x7FFFFFFF)
        above, all_above = counts_before(counts, split, splits, 0, MAX_SPLITS)
        on, all_on = counts_before(counts, split, splits, 2, MAX_SPLITS)
        first_row = num_decodes + batch * tl.load(share_ptr)
        first_slot = tl.load(row_slot_ptr + batch) + 1  # after the current token's
        revived = 0
    table = position_table_ptr + batch * position_table_stride
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        home = home_slot(table, p, valid, BLOCK_SIZE)
        key = tl.load(token_key_ptr + home, mask=valid, other=-1)
        tie = (key == threshold).to(tl.int32)
        order = met + tl.cumsum(tie, 0)
        if MARKS:
            taken = (key > threshold) | ((tie != 0) & (order <= ties))
            marked = valid if FIRST else taken
            tl.store(selected_ptr + home, tl.where(taken, stage, 0).to(tl.int8), mask=marked)
        if LISTS == 2:
            absent = valid & (tl.load(level_ptr + home, mask=key >= best, other=127) == stage)
            better = absent & (key > best)
            level_with = (absent & (key == best)).to(tl.int32)
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
            tl.store(level_ptr + home, stage + 1, mask=chosen)
            above += tl.sum(better.to(tl.int32), 0)
            on += tl.sum(level_with, 0)
            revived += tl.sum(chosen.to(tl.int32), 0)
        met += tl.sum(tie, 0)
    if LISTS == 2:
        if revived > 0:
            keys_at = table_ptr + tl.load(req_index_ptr + batch) * table_stride
            tl.atomic_add(keys_at + 1 + 2 * num_stages + stage, revived, sem="relaxed")
            tl.atomic_add(key_len_ptr + batch, revived, sem="relaxed")
            tl.atomic_add(num_revived_ptr + batch, revived, sem="relaxed")


def select_decode_triton(s, rows, share, num_decodes, stage, num_stages, lists, marks):
    table = s.position_table
    find_best(s, 0, num_decodes, stage, lists)
    splits = num_splits(num_decodes)
    _select_decode_kernel[(num_decodes, splits)](
        s.histogram, s.found, s.counts, s.token_key, s.level, s.selected, table, table.stride(0),
        s.num_prompt, s.active[stage], s.table, s.table.stride(0), s.req_index, share,
        rows.key_len, rows.num_revived, rows.position, rows.request, rows.slot,
        num_decodes, num_stages, splits, stage, FIRST=stage == 1, LISTS=lists, MARKS=marks,
        MAX_SPLITS=MAX_SPLITS, BLOCK_SIZE=s.block_size, BLOCK=BLOCK,
    )  # fmt: skip


def select_decode_reference(s, rows, share, num_decodes, stage, num_stages, lists, marks):
    for i in range(num_decodes):
        if not s.active[stage, i]:
            continue
        state = s.table[int(s.req_index[i])]
        k = int(state[1 + stage])
        home = home_slots(s, i)
        key = s.token_key[home]
        best = best_mask(key, k)
        if marks:
            marked = torch.ones_like(best) if stage == 1 else best
            s.selected[home[marked]] = (stage * best[marked]).to(torch.int8)
        if lists == 1:
            continue
        absent = best & (s.level[home] == stage)
        revived = min(int(absent.sum()), int(s.limit[stage, i]))
        chosen = best_mask(key.where(absent, NO_CANDIDATE), revived).nonzero()[:, 0]
        if revived:
            # As the kernel orders them: ties of the least go last.
            chosen = chosen[torch.sort((key[chosen] == key[chosen].min()).int(), stable=True)[1]]
        first = num_decodes + i * int(share)
        mine = slice(first, first + revived)
        rows.position[mine] = chosen
        rows.request[mine] = i
        rows.slot[mine] = (
            rows.slot[i] + 1 + torch.arange(revived, device=rows.slot.device, dtype=torch.int32)
        )
        s.level[home[chosen]] = stage + 1
        state[1 + 2 * num_stages + stage] += revived
        rows.num_revived[i] += revived
        rows.key_len[i] += revived


def select_decode(
    s: Selection,
    rows: Rows,
    share: torch.Tensor,
    num_decodes: int,
    stage: int,
    num_stages: int,
    lists: int,
    marks: bool,
) -> None:
    """Choose the tokens that the active decodes revive into ``stage``.

    Fills the revived part of ``rows`` (set up by ``begin_step``), adds to ``key_len`` and
    ``num_revived``, and updates ``level``, ``selected`` and the requests' ``prompt_keys``.

    Args:
        share: ``[1]`` int32, rows set aside for each request.
        lists: 2: tokens may be revived; 1: the selection is only marked.
        marks: write ``selected``.
    """
    run = select_decode_triton if s.token_key.is_cuda else select_decode_reference
    run(s, rows, share, num_decodes, stage, num_stages, lists, marks)
