"""Rank of each prompt token at a boundary, from its score and its neighbours'.

    rank(p) = bits of the highest score of the candidates from p - before to p + after

The first and last tokens of the prompt rank above every score. The ranks' first digits are counted
on the way, for ``top_k``.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.kernels.top_k import (
    ALWAYS_KEPT,
    BLOCK,
    NO_CANDIDATE,
    add_digits,
    bounds_of,
    histogram_of,
    num_splits,
    split_bounds,
)


@dataclass(frozen=True)
class RankRule:
    """Attributes:
    before, after: positions on either side of a token whose highest score is its own.
    first_tokens, last_tokens: always kept, at either end of the prompt.
    """

    before: int
    after: int
    first_tokens: int
    last_tokens: int


def rank_of(score: float) -> int:
    """The rank of a score, 0 or more, as the kernel makes it."""
    return int(torch.tensor(score, dtype=torch.float32).view(torch.int32))


@triton.jit
def _is_candidate(
    level_ptr, selected_ptr, at, mask, stage, FIRST: tl.constexpr, STRICT: tl.constexpr
):
    """Whether positions have keys in the stage before the boundary (and, when strict, are in this
    step's selection of that stage). All have keys in stage 0."""
    candidate = mask
    if not FIRST:
        candidate &= tl.load(level_ptr + at, mask=mask, other=0) >= stage
        if STRICT:
            candidate &= tl.load(selected_ptr + at, mask=mask, other=0) >= stage - 1
    return candidate


@step_jit
def _rank_kernel(
    score_ptr,
    rank_ptr,
    level_ptr,
    selected_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    histogram_ptr,
    num_prompt_ptr,
    first_ptr,
    end_ptr,
    revivable_ptr,
    active_ptr,
    first_tokens,
    last_tokens,
    first_request,
    splits,
    stage,
    FIRST: tl.constexpr,  # the first boundary: all tokens are candidates
    BEFORE: tl.constexpr,
    AFTER: tl.constexpr,
    STRICT: tl.constexpr,
    LISTS: tl.constexpr,
    PREFILL: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    if tl.load(active_ptr + batch) == 0:
        return
    num_prompt = tl.load(num_prompt_ptr + batch)
    table = block_table_ptr + batch * block_table_stride
    row = histogram_of(histogram_ptr, batch)
    first, last = bounds_of(batch, num_prompt_ptr, first_ptr, end_ptr, PREFILL)
    start, end = split_bounds(first, last, tl.program_id(1), splits, BLOCK)
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        best = tl.full([BLOCK], -1.0, tl.float32)
        own = valid
        for shift in range(-BEFORE, AFTER + 1):
            near = p + shift
            mask = (near >= 0) & (near < num_prompt)
            at = state_at(
                table, near, mask, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
            )
            candidate = _is_candidate(level_ptr, selected_ptr, at, mask, stage, FIRST, STRICT)
            score = tl.load(score_ptr + at, mask=candidate, other=-1.0)
            best = tl.maximum(best, tl.where(score >= 0, score, -1.0))
            if shift == 0:
                own = candidate & valid
        rank = tl.maximum(best, 0.0).to(tl.int32, bitcast=True)
        always = (p < first_tokens) | (p >= num_prompt - last_tokens)
        rank = tl.where(always, 0x7F800000, rank)
        at = state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        tl.store(rank_ptr + at, tl.where(own, rank, -1), mask=valid)
        add_digits(row, rank, own, 0, 0)
        if LISTS == 2:
            here = own & (p < tl.load(revivable_ptr + batch))
            absent = here & (tl.load(level_ptr + at, mask=here, other=127) == stage)
            add_digits(row, rank, absent, 0, 1)


def rank_tokens_triton(s, stage, batch, lists, strict, rule, prefill=False):
    splits = num_splits(len(batch))
    state = s.state
    _rank_kernel[(len(batch), splits)](
        state.score,
        state.rank,
        state.level,
        state.selected,
        *state.pages.kernel_args,
        s.search.histogram,
        s.num_prompt,
        s.choice.first,
        s.choice.end,
        s.revivable,
        s.active[stage],
        rule.first_tokens,
        rule.last_tokens,
        batch.start,
        splits,
        stage,
        FIRST=stage == 1,
        BEFORE=rule.before,
        AFTER=rule.after,
        STRICT=strict,
        LISTS=lists,
        PREFILL=prefill,
        BLOCK=BLOCK,
        **state.pages.kernel_constants,
    )


def _candidates(state, at, stage, strict):
    if stage == 1:
        return torch.ones_like(at, dtype=torch.bool)
    candidate = state.level[at] >= stage
    if strict:
        candidate &= state.selected[at] >= stage - 1
    return candidate


def rank_tokens_reference(s, stage, batch, lists, strict, rule, prefill=False):
    for i in batch:
        if not s.active[stage, i]:
            continue
        at = s.state.prompt_at(i, s.num_prompt)
        candidate = _candidates(s.state, at, stage, strict)
        score = s.state.score[at].where(candidate, -1.0)
        score = score.where(score >= 0, -1.0)
        around = F.pad(score[None], (rule.before, rule.after), value=-1.0)
        score = F.max_pool1d(around, rule.before + 1 + rule.after, 1)[0]
        rank = score.clamp(min=0).view(torch.int32)
        rank[: rule.first_tokens] = ALWAYS_KEPT
        rank[max(len(rank) - rule.last_tokens, 0) :] = ALWAYS_KEPT
        mine = slice(int(s.choice.first[i]), int(s.choice.end[i])) if prefill else slice(None)
        s.state.rank[at[mine]] = rank.where(candidate, NO_CANDIDATE)[mine]


def rank_tokens(
    s: Selection,
    stage: int,
    batch: range,
    lists: int,
    strict: bool,
    rule: RankRule,
    prefill: bool = False,
) -> None:
    """Turn scores into ranks for the boundary before ``stage``, for the active requests of
    ``batch``.

    Args:
        lists: 1 or 2, as in ``top_k.find_best``.
        strict: only tokens that this step selected for the stage before are candidates.
        prefill: whether these are prefills: only tokens of ``s.choice`` are ranked.
    """
    run = rank_tokens_triton if s.index.is_cuda else rank_tokens_reference
    run(s, stage, batch, lists, strict, rule, prefill)
