"""Blocks of the KV cache copied in one launch, however many there are."""

import torch

from vllm.triton_utils import tl, triton

from lazyllm_vllm.kernels.jit import step_jit

# Words that a program copies at a time.
_AT_ONCE = 4096


@step_jit
def _copy_blocks_kernel(
    blocks_ptr,
    stride_block,
    stride_page,
    slot_position_ptr,
    pairs_ptr,  # [2, pairs]
    num_pairs,
    WORDS: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    pair = tl.program_id(0)
    page = tl.program_id(1)
    source = tl.load(pairs_ptr + pair).to(tl.int64)
    destination = tl.load(pairs_ptr + num_pairs + pair).to(tl.int64)
    i = tl.arange(0, AT_ONCE)
    if page == 0:
        slot = tl.arange(0, SLOTS_PAD)
        position = tl.load(slot_position_ptr + source * SLOTS + slot, mask=slot < SLOTS)
        tl.store(slot_position_ptr + destination * SLOTS + slot, position, mask=slot < SLOTS)
    from_ptr = blocks_ptr + source * stride_block + page.to(tl.int64) * stride_page
    to_ptr = blocks_ptr + destination * stride_block + page.to(tl.int64) * stride_page
    for first in range(0, WORDS, AT_ONCE):
        mask = first + i < WORDS
        tl.store(to_ptr + first + i, tl.load(from_ptr + first + i, mask=mask), mask=mask)


def copy_blocks_triton(blocks, slot_position, pairs):
    num_pairs, (_, pages, words) = pairs.shape[1], blocks.shape
    assert blocks.stride(2) == 1 and slot_position.is_contiguous() and pairs.is_contiguous()
    _copy_blocks_kernel[(num_pairs, pages)](
        blocks,
        blocks.stride(0),
        blocks.stride(1),
        slot_position,
        pairs,
        num_pairs,
        WORDS=words,
        SLOTS=slot_position.shape[1],
        SLOTS_PAD=triton.next_power_of_2(slot_position.shape[1]),
        AT_ONCE=_AT_ONCE,
    )


def copy_blocks_reference(blocks, slot_position, pairs):
    source, destination = pairs.long()
    blocks[destination] = blocks[source]
    slot_position[destination] = slot_position[source]


def copy_blocks(blocks: torch.Tensor, slot_position: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copy whole blocks, and the positions of the keys in them.

    Args:
        blocks: ``[blocks, pages, words]`` int32.
        slot_position: ``[blocks, block_size]`` int32.
        pairs: ``[2, pairs]`` int32, source and destination; no block is both.
    """
    run = copy_blocks_triton if blocks.is_cuda else copy_blocks_reference
    run(blocks, slot_position, pairs)
