"""The k best ranks of a request, ties to the lower position, without sorting.

Scores are never negative, so the bits of a float32 order as the float does: ranks are int32, -1 for
a position that is no candidate. The k-th largest is found by a radix search in three digits, and
each pass over the positions is spread over ``num_splits`` programs a request, which add to one
histogram a digit: ``rank`` fills the first digit's, ``_refine_kernel`` the others', and
``_count_kernel`` then knows the threshold and counts, split by split, what lies above it and on it,
so that whoever takes the best knows how many were taken in the splits before.

Two lists are searched at once: 0, all candidates, for the k best of them; 1, for decodes, those
that have no keys in the stage yet, for the best that may be revived: those that rank so high.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit
from lazyllm_vllm.kernels.prompt_pages import state_at
from lazyllm_vllm.kernels.selection import Search, Selection

ALWAYS_KEPT = 0x7F800000  # the bits of infinity: above every score
NO_CANDIDATE = -1
MAX_SPLITS = 128
BLOCK = 1024  # positions a program looks at together
BINS = 4096  # of a list: 2048 for a rank's first digit (bits 30-20), 1024 each for 19-10 and 9-0
NUM_COUNTS = 3


def make_search(batch: int, device: torch.device) -> Search:
    """Clean scratch for ``batch`` requests."""
    ints = {"dtype": torch.int32, "device": device}
    return Search(
        histogram=torch.zeros(batch, 2 * BINS, **ints),
        thresholds=torch.zeros(batch, 4, **ints),
        split_counts=torch.zeros(batch, NUM_COUNTS, MAX_SPLITS, **ints),
    )


def num_splits(num_requests: int) -> int:
    """Programs that share a request's positions: about two for each of a large GPU's processors."""
    return max(1, min(MAX_SPLITS, 264 // num_requests))


@triton.jit
def split_bounds(first, end, split, splits, BLOCK: tl.constexpr):
    """Positions of the split: all splits but the last have as many whole blocks."""
    size = tl.cdiv(tl.cdiv(end - first, BLOCK), splits) * BLOCK
    start = first + split * size
    return start, tl.minimum(start + size, end)


@triton.jit
def bounds_of(batch, num_prompt_ptr, first_ptr, end_ptr, PREFILL: tl.constexpr):
    """The positions among which a request chooses."""
    if PREFILL:
        return tl.load(first_ptr + batch), tl.load(end_ptr + batch)
    return 0, tl.load(num_prompt_ptr + batch)


@triton.jit
def histogram_of(histogram_ptr, batch):
    """The request's two histograms."""
    return histogram_ptr + batch * 8192


@triton.jit
def counts_of(counts_ptr, batch, MAX_SPLITS: tl.constexpr):
    """The request's counts."""
    return counts_ptr + batch * 3 * MAX_SPLITS


@triton.jit
def _digit(rank, STEP: tl.constexpr):
    if STEP == 0:
        return rank >> 20
    elif STEP == 1:
        return (rank >> 10) & 1023
    else:
        return rank & 1023


@triton.jit
def add_digits(histogram_row, rank, listed, STEP: tl.constexpr, LIST: tl.constexpr):
    """Count the listed ranks' digits into the request's histogram."""
    bins: tl.constexpr = 2048 if STEP == 0 else 1024
    first: tl.constexpr = 4096 * LIST + (0 if STEP == 0 else 1024 + 1024 * STEP)
    counts = tl.histogram(tl.where(listed, _digit(rank, STEP), 0), bins, mask=listed)
    at = tl.arange(0, bins)
    tl.atomic_add(histogram_row + first + at, counts, mask=counts > 0, sem="relaxed")


@triton.jit
def _next_digit(histogram_row, prefix, remaining, STEP: tl.constexpr, LIST: tl.constexpr):
    bins: tl.constexpr = 2048 if STEP == 0 else 1024
    first: tl.constexpr = 4096 * LIST + (0 if STEP == 0 else 1024 + 1024 * STEP)
    at = tl.arange(0, bins)
    counts = tl.load(histogram_row + first + at)
    here_and_above = tl.cumsum(counts, 0, reverse=True)
    if STEP == 0:
        remaining = tl.minimum(remaining, tl.max(here_and_above, 0))
    digit = tl.sum((here_and_above >= remaining).to(tl.int32), 0) - 1
    remaining -= tl.sum(tl.where(at > digit, counts, 0), 0)
    return prefix * bins + digit, remaining


@triton.jit
def prefix_of(histogram_row, k, STEPS: tl.constexpr, LIST: tl.constexpr):
    """First ``STEPS`` digits of the k-th largest rank (of the least one, if there are fewer; above
    all ranks, if k is 0 or there are none), and how many of the ranks with them are among the k."""
    prefix, remaining = _next_digit(histogram_row, 0, k, 0, LIST)
    if STEPS > 1:
        prefix, remaining = _next_digit(histogram_row, prefix, remaining, 1, LIST)
    if STEPS > 2:
        prefix, remaining = _next_digit(histogram_row, prefix, remaining, 2, LIST)
    return prefix, remaining


@triton.jit
def _count_of(batch, kept_ptr, counts_stride, index_ptr, stage, PREFILL: tl.constexpr):
    """k: how many tokens are chosen; for a prefill that has a place of its own."""
    if PREFILL:
        return tl.load(kept_ptr + stage * counts_stride + batch)
    return tl.load(kept_ptr + tl.load(index_ptr + batch) * counts_stride + stage)


@step_jit
def _refine_kernel(
    histogram_ptr,
    rank_ptr,
    level_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    num_prompt_ptr,
    first_ptr,
    end_ptr,
    revivable_ptr,
    active_ptr,
    limit_ptr,
    kept_ptr,
    counts_stride,
    index_ptr,
    first_request,
    splits,
    stage,
    STEP: tl.constexpr,
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
    first, last = bounds_of(batch, num_prompt_ptr, first_ptr, end_ptr, PREFILL)
    start, end = split_bounds(first, last, tl.program_id(1), splits, BLOCK)
    if start >= end:
        return
    k = _count_of(batch, kept_ptr, counts_stride, index_ptr, stage, PREFILL)
    row = histogram_of(histogram_ptr, batch)
    prefix_0, ties_0 = prefix_of(row, k, STEP, 0)
    prefix_1 = 0
    if LISTS == 2:
        prefix_1, ties_1 = prefix_of(row, tl.load(limit_ptr + batch), STEP, 1)
    table = block_table_ptr + batch * block_table_stride
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        at = state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        rank = tl.load(rank_ptr + at, mask=valid, other=-1)
        above = rank >> (30 - 10 * STEP)
        add_digits(row, rank, (rank >= 0) & (above == prefix_0), STEP, 0)
        if LISTS == 2:
            listed = (rank >= 0) & (above == prefix_1) & (p < tl.load(revivable_ptr + batch))
            listed &= tl.load(level_ptr + at, mask=listed, other=127) == stage
            add_digits(row, rank, listed, STEP, 1)


@step_jit
def _count_kernel(
    thresholds_ptr,  # [batch, 4] int32: threshold and ties of list 0, of list 1
    counts_ptr,  # [batch, 3, MAX_SPLITS]: see Search.split_counts
    histogram_ptr,
    rank_ptr,
    level_ptr,
    block_table_ptr,
    block_table_stride,
    page_stride,
    block_stride,
    num_prompt_ptr,
    first_ptr,
    end_ptr,
    revivable_ptr,
    active_ptr,
    limit_ptr,
    kept_ptr,
    counts_stride,
    index_ptr,
    first_request,
    splits,
    stage,
    least_revived,
    num_turns,
    LISTS: tl.constexpr,
    PREFILL: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = first_request + tl.program_id(0)
    split = tl.program_id(1)
    if tl.load(active_ptr + batch) == 0:
        return
    first, last = bounds_of(batch, num_prompt_ptr, first_ptr, end_ptr, PREFILL)
    k = _count_of(batch, kept_ptr, counts_stride, index_ptr, stage, PREFILL)
    row = histogram_of(histogram_ptr, batch)
    start, end = split_bounds(first, last, split, splits, BLOCK)
    counts = counts_of(counts_ptr, batch, MAX_SPLITS) + split
    if start >= end:
        for which in tl.static_range(3):
            tl.store(counts + which * MAX_SPLITS, 0)
        return
    threshold, ties = prefix_of(row, k, 3, 0)
    best = threshold
    if LISTS == 2:
        threshold_1, ties_1 = prefix_of(row, tl.load(limit_ptr + batch), 3, 1)
        if batch < num_turns:
            best = threshold_1
        else:
            if threshold_1 < least_revived:  # fewer than the limit rank so high: all that do
                threshold_1, ties_1 = least_revived, 0x7FFFFFFF
            best = tl.maximum(threshold, threshold_1)
    if split == 0:
        tl.store(thresholds_ptr + batch * 4, threshold)
        tl.store(thresholds_ptr + batch * 4 + 1, ties)
        if LISTS == 2:
            tl.store(thresholds_ptr + batch * 4 + 2, threshold_1)
            tl.store(thresholds_ptr + batch * 4 + 3, ties_1)

    table = block_table_ptr + batch * block_table_stride
    num_above = 0
    num_ties = 0
    num_third = 0
    for p0 in range(start, end, BLOCK):
        p = p0 + tl.arange(0, BLOCK)
        valid = p < end
        at = state_at(
            table, p, valid, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE, PER_SLOT
        )
        rank = tl.load(rank_ptr + at, mask=valid, other=-1)
        num_ties += tl.sum((rank == threshold).to(tl.int32), 0)
        if LISTS == 2:
            here = (rank >= best) & (p < tl.load(revivable_ptr + batch))
            absent = tl.load(level_ptr + at, mask=here, other=127) == stage
            num_above += tl.sum((absent & (rank > best)).to(tl.int32), 0)
            num_third += tl.sum((absent & (rank == best)).to(tl.int32), 0)
        else:
            num_above += tl.sum((rank > threshold).to(tl.int32), 0)
            num_third += tl.sum((rank >= 0).to(tl.int32), 0)
    tl.store(counts, num_above)
    tl.store(counts + MAX_SPLITS, num_ties)
    tl.store(counts + 2 * MAX_SPLITS, num_third)


def find_best(
    s: Selection, stage: int, batch: range, lists: int, num_turns: int = 0, prefill: bool = False
) -> None:
    """Fill the thresholds and split counts of the active requests of ``batch``, whose ranks and
    first digits ``rank_tokens`` left.

    Args:
        lists: 2: also the best of those that have no keys in the stage, as many as ``s.limit`` and
            of at least ``s.least_revived``.
        num_turns: of so many requests, the first of the batch, as many, whatever their rank.
        prefill: whether these are prefills, which choose as ``s.choice`` says.
    """
    count = s.choice.count if prefill else s.counts.kept
    pages, search = s.state.pages, s.search
    splits = num_splits(len(batch))
    common = (
        search.histogram,
        s.state.rank,
        s.state.level,
        *pages.kernel_args,
        s.num_prompt,
        s.choice.first,
        s.choice.end,
        s.revivable,
        s.active[stage],
        s.limit[stage],
        count,
        count.stride(0),
        s.index,
        batch.start,
        splits,
        stage,
    )
    constants = {"LISTS": lists, "PREFILL": prefill, "BLOCK": BLOCK} | pages.kernel_constants
    for step in (1, 2):
        _refine_kernel[(len(batch), splits)](*common, STEP=step, **constants)
    _count_kernel[(len(batch), splits)](
        search.thresholds,
        search.split_counts,
        *common,
        s.least_revived,
        num_turns,
        MAX_SPLITS=MAX_SPLITS,
        **constants,
    )


@triton.jit
def counts_before(counts_row, split, splits, WHICH: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """Sum of one of the counts over the splits before this one, and over all."""
    at = tl.arange(0, MAX_SPLITS)
    counts = tl.load(counts_row + WHICH * MAX_SPLITS + at, mask=at < splits, other=0)
    return tl.sum(tl.where(at < split, counts, 0), 0), tl.sum(counts, 0)


@triton.jit
def clear_histogram(histogram_row, split, splits):
    """Leave zeros for the next boundary; each split clears its part."""
    for part in range(split, 8, splits):
        at = part * 1024 + tl.arange(0, 1024)
        tl.store(histogram_row + at, tl.zeros([1024], tl.int32))


def best_mask(rank: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k best by (rank descending, position ascending), no candidates left out."""
    order = torch.sort(rank, descending=True, stable=True).indices[:k]
    best = torch.zeros_like(rank, dtype=torch.bool)
    best[order] = True
    return best & (rank >= 0)
