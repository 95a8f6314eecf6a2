"""Scores out of the prompt state side by side, and back into it.

    dense[start[i] + p] = score of position p of request i
    start[i] = tokens of the active requests of the batch before i

So what several processes made of the same prompts is one tensor in each, whatever pages it came
from.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.kernels.top_k import BLOCK, num_splits, split_bounds


@step_jit
def _dense_scores_kernel(
    score_ptr,  # a plane of the prompt state, fp32
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    dense_ptr,
    num_prompt_ptr,
    revivable_ptr,
    active_ptr,
    first_request,
    splits,
    scale,
    BACK: tl.constexpr,  # into the prompt state; else out of it
    MAX_BATCH: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    num_prompt = tl.load(num_prompt_ptr + batch)
    if (tl.load(active_ptr + batch) == 0) | (tl.load(revivable_ptr + batch) < num_prompt):
        return
    other = first_request + tl.arange(0, MAX_BATCH)
    mask = other < batch
    lengths = tl.load(num_prompt_ptr + other, mask=mask, other=0)
    counts = tl.load(active_ptr + other, mask=mask, other=0) != 0
    counts &= tl.load(revivable_ptr + other, mask=mask, other=0) >= lengths
    first = tl.sum(tl.where(counts, lengths, 0), 0)
    table = block_table_ptr + batch * block_table_stride
    start, end = split_bounds(0, num_prompt, tl.program_id(1), splits, BLOCK)
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        at = score_ptr + state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        dense = dense_ptr + first.to(tl.int64) + p
        if BACK:
            tl.store(at, tl.load(dense, mask=valid) * scale, mask=valid)
        else:
            tl.store(dense, tl.load(at, mask=valid), mask=valid)


def _triton(s: Selection, stage: int, batch: range, dense, factor: float, back: bool) -> None:
    splits, pages = num_splits(len(batch)), s.state.pages
    _dense_scores_kernel[(len(batch), splits)](
        s.state.score,
        *pages.kernel_args,
        dense,
        s.num_prompt,
        s.revivable,
        s.active[stage],
        batch.start,
        splits,
        factor,
        BACK=back,
        MAX_BATCH=triton.next_power_of_2(s.active.shape[1]),
        BLOCK=BLOCK,
        **pages.kernel_constants,
    )


def _reference(s: Selection, stage: int, batch: range, dense, factor: float, back: bool) -> None:
    start = 0
    for i in batch:
        if not s.active[stage, i] or s.revivable[i] < s.num_prompt[i]:
            continue
        at = s.state.prompt_at(i, s.num_prompt)
        mine = slice(start, start + len(at))
        if back:
            s.state.score[at] = dense[mine] * factor
        else:
            dense[mine] = s.state.score[at]
        start = mine.stop


def gather_scores(s: Selection, stage: int, batch: range, dense: torch.Tensor) -> None:
    """The scores of all prompt tokens of the requests of ``batch`` that are active at the boundary
    before ``stage``, those that are no candidates included. A long turn's are those of its prefill:
    its last token, among the decodes, has none.

    Args:
        dense: ``[tokens or more]`` fp32, written.
    """
    (_triton if s.index.is_cuda else _reference)(s, stage, batch, dense, 1.0, False)


def scatter_scores(
    s: Selection, stage: int, batch: range, dense: torch.Tensor, factor: float
) -> None:
    """The same back into the prompt state, each multiplied by ``factor``."""
    (_triton if s.index.is_cuda else _reference)(s, stage, batch, dense, factor, True)
