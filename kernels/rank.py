"""Rank of each prompt token at a boundary, from its score and its neighbours'.

    key(p) = highest score of the candidates within score_pool // 2 positions of p

The first and last tokens of the prompt rank above every score. The keys' first digits are counted
on the way, for ``top_k``.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.state import Selection
from lazyllm_vllm.kernels.top_k import (
    ALWAYS_KEPT,
    BLOCK,
    NO_CANDIDATE,
    add_digits,
    histogram_of,
    home_slot,
    home_slots,
    num_splits,
    split_bounds,
)


@triton.jit
def _is_candidate(
    level_ptr, selected_ptr, home, mask, stage, FIRST: tl.constexpr, STRICT: tl.constexpr
):
    """Whether positions have keys in the stage before the boundary (and, when strict, are in this
    step's selection of that stage). All have keys in stage 0."""
    candidate = mask
    if not FIRST:
        candidate &= tl.load(level_ptr + home, mask=mask, other=0) >= stage
        if STRICT:
            candidate &= tl.load(selected_ptr + home, mask=mask, other=0) >= stage - 1
    return candidate


@step_jit
def _rank_kernel(
    token_key_ptr,
    histogram_ptr,
    token_score_ptr,
    level_ptr,
    selected_ptr,
    position_table_ptr,
    position_table_stride,
    num_prompt_ptr,
    active_ptr,
    first_tokens,
    last_tokens,
    first_request,
    splits,
    stage,
    FIRST: tl.constexpr,  # the first boundary: all tokens are candidates
    POOL: tl.constexpr,
    STRICT: tl.constexpr,
    LISTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    if tl.load(active_ptr + batch) == 0:
        return
    num_prompt = tl.load(num_prompt_ptr + batch)
    table = position_table_ptr + batch * position_table_stride
    row = histogram_of(histogram_ptr, batch)
    start, end = split_bounds(num_prompt, tl.program_id(1), splits, BLOCK)
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        best = tl.full([BLOCK], -1.0, tl.float32)
        own = valid
        for shift in range(-(POOL // 2), POOL // 2 + 1):
            near = p + shift
            mask = (near >= 0) & (near < num_prompt)
            home = home_slot(table, near, mask, BLOCK_SIZE)
            candidate = _is_candidate(level_ptr, selected_ptr, home, mask, stage, FIRST, STRICT)
            score = tl.load(token_score_ptr + home, mask=candidate, other=-1.0)
            best = tl.maximum(best, tl.where(score >= 0, score, -1.0))
            if shift == 0:
                own = candidate & valid
        key = tl.maximum(best, 0.0).to(tl.int32, bitcast=True)
        always = (p < first_tokens) | (p >= num_prompt - last_tokens)
        key = tl.where(always, 0x7F800000, key)
        home = home_slot(table, p, valid, BLOCK_SIZE)
        tl.store(token_key_ptr + home, tl.where(own, key, -1), mask=valid)
        add_digits(row, key, own, 0, 0)
        if LISTS == 2:
            absent = own & (tl.load(level_ptr + home, mask=own, other=127) == stage)
            add_digits(row, key, absent, 0, 1)


def rank_tokens_triton(
    s, first_request, num_requests, stage, lists, strict, pool, first_tokens, last_tokens
):
    splits = num_splits(num_requests)
    table = s.position_table
    _rank_kernel[(num_requests, splits)](
        s.token_key, s.histogram, s.token_score, s.level, s.selected, table, table.stride(0),
        s.num_prompt, s.active[stage], first_tokens, last_tokens, first_request, splits,
        stage, FIRST=stage == 1, POOL=pool, STRICT=strict, LISTS=lists,
        BLOCK_SIZE=s.block_size, BLOCK=BLOCK,
    )  # fmt: skip


def _candidates(s, home, stage, strict):
    if stage == 1:
        return torch.ones_like(home, dtype=torch.bool)
    candidate = s.level[home] >= stage
    if strict:
        candidate &= s.selected[home] >= stage - 1
    return candidate


def rank_tokens_reference(
    s, first_request, num_requests, stage, lists, strict, pool, first_tokens, last_tokens
):
    for i in range(first_request, first_request + num_requests):
        if not s.active[stage, i]:
            continue
        home = home_slots(s, i)
        candidate = _candidates(s, home, stage, strict)
        score = s.token_score[home].where(candidate, -1.0)
        score = score.where(score >= 0, -1.0)
        score = torch.nn.functional.max_pool1d(score[None], pool, 1, pool // 2)[0]
        key = score.clamp(min=0).view(torch.int32)
        key[:first_tokens] = ALWAYS_KEPT
        key[max(len(key) - last_tokens, 0) :] = ALWAYS_KEPT
        s.token_key[home] = key.where(candidate, NO_CANDIDATE)


def rank_tokens(
    s: Selection,
    first_request: int,
    num_requests: int,
    stage: int,
    lists: int,
    strict: bool,
    pool: int,
    first_tokens: int,
    last_tokens: int,
) -> None:
    """Turn scores into keys for the boundary before ``stage``, for the active requests among
    ``first_request .. first_request + num_requests - 1``; ``lists`` as in ``find_best``."""
    run = rank_tokens_triton if s.token_key.is_cuda else rank_tokens_reference
    run(s, first_request, num_requests, stage, lists, strict, pool, first_tokens, last_tokens)
