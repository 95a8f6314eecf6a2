"""The k best keys of a request, ties to the lower position, without sorting.

Scores are never negative, so the bits of a float32 order as the float does: keys are int32, -1 for
a position that is no candidate, and the k-th largest is found by a radix search, 8 bits a pass. A
second pass in order of position then takes what is above it, and of what equals it the first.
"""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.attention import physical_slots

ALWAYS_KEPT = 0x7F800000  # the bits of infinity: above every score
NO_CANDIDATE = -1


@triton.jit
def home_slot(position_table_row, position, mask, BLOCK_SIZE: tl.constexpr):
    """Physical slot in stage 0 of each position."""
    block = tl.load(position_table_row + position // BLOCK_SIZE, mask=mask, other=0)
    return block.to(tl.int64) * BLOCK_SIZE + position % BLOCK_SIZE


@triton.jit
def kth_key(token_key_ptr, table, num_prompt, k, BLOCK_SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The k-th largest key, and how many keys equal to it are among the k (all of them, at
    threshold 0, when there are fewer than k)."""
    bins = tl.arange(0, 256)
    prefix = 0
    remaining = k
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], tl.int32)
        for p0 in range(0, num_prompt, BLOCK):
            p = p0 + tl.arange(0, BLOCK)
            valid = p < num_prompt
            home = home_slot(table, p, valid, BLOCK_SIZE)
            key = tl.load(token_key_ptr + home, mask=valid, other=-1)
            if step == 0:
                valid = valid & (key >= 0)
            else:
                valid = valid & (key >= 0) & ((key >> (shift + 8)) == prefix)
            counts += tl.histogram((key >> shift) & 255, 256, mask=valid)
        # Keys in this bin or a higher one.
        suffix = tl.cumsum(counts, 0, reverse=True)
        if step == 0:
            remaining = tl.minimum(remaining, tl.max(suffix, 0))
        digit = tl.maximum(tl.sum((suffix >= remaining).to(tl.int32), 0) - 1, 0)
        remaining -= tl.sum(tl.where(bins > digit, counts, 0), 0)
        prefix = (prefix << 8) | digit
    return prefix, remaining


@triton.jit
def take_best(key, threshold, ties, ties_before):
    """Which of a tile's keys are among the k best, and how many ties were met so far."""
    tie = key == threshold
    order = ties_before + tl.cumsum(tie.to(tl.int32), 0)
    taken = (key > threshold) | (tie & (order <= ties))
    return taken, ties_before + tl.sum(tie.to(tl.int32), 0)


def home_slots(s, i):
    """Physical slots in stage 0 of request i's prompt, in order of position."""
    position = torch.arange(int(s.num_prompt[i]), device=s.token_key.device)
    return physical_slots(s.position_table[i], position, s.block_size)


def best_mask(key: torch.Tensor, k: int) -> torch.Tensor:
    """Mask of the k best keys by (key descending, position ascending), no candidates left out."""
    order = torch.sort(key, descending=True, stable=True).indices[:k]
    best = torch.zeros_like(key, dtype=torch.bool)
    best[order] = True
    return best & (key >= 0)
