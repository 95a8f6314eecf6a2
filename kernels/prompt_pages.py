"""What is private to a pruned prompt: its state, and the Aux Cache of what it drops behind stage 1.

Both lie in blocks of vLLM's pool, in a KV cache group of their own. A block has ``pages`` pages,
each cut into ``per_page`` slots as large as a hidden state:

    slot -> block_table[slot // (pages * per_page)], page slot // per_page % pages, place
            slot % per_page

A slot holds the state of ``positions_per_slot`` positions, as six planes of four-byte numbers. The
first ``ceil(room / positions_per_slot)`` slots are for the state of so many positions, those of the
prompt and of what may come after it; those behind are the Aux Cache, which has a hidden state for
each position with keys in stage 1.
"""

from dataclasses import dataclass
from functools import cached_property

import torch

from vllm.triton_utils import tl, triton

PLANES = 6


@dataclass(frozen=True)
class Pages:
    """Where a group's slots lie in the KV cache's backing buffer, in elements of one type.

    Attributes:
        block_table: ``[batch, width]`` int32.
        pages: pages a block; per_page: slots a page; slot_size: elements a slot.
        positions_per_slot: positions whose state a slot holds.
        page_stride, block_stride: elements between pages of a block, and between blocks.
    """

    block_table: torch.Tensor
    pages: int
    per_page: int
    slot_size: int
    positions_per_slot: int
    page_stride: int
    block_stride: int

    def slot_address(self, request: torch.Tensor | int, slot: torch.Tensor) -> torch.Tensor:
        """First element of each slot, int64; ``request`` holds batch indices, ``slot`` int64."""
        block = self.block_table[request, slot // (self.pages * self.per_page)].long()
        page = slot // self.per_page % self.pages
        place = slot % self.per_page * self.slot_size
        return block * self.block_stride + page * self.page_stride + place

    @cached_property
    def kernel_args(self) -> tuple:
        """``block_table, block_table_stride, page_stride, block_stride``, as kernels take them."""
        return self.block_table, self.block_table.stride(0), self.page_stride, self.block_stride

    @cached_property
    def kernel_constants(self) -> dict:
        return {
            "PAGES": self.pages,
            "PER_PAGE": self.per_page,
            "SLOT_SIZE": self.slot_size,
            "PER_SLOT": self.positions_per_slot,
        }


@dataclass(frozen=True)
class PromptState:
    """What is known of each position of the prompts that are pruned.

    All planes are flat views of one buffer; ``at`` gives a position's place in every plane.

    Attributes:
        score: fp32, the attention paid to the position.
        rank: int32, what it is chosen by; -1: no candidate at this boundary.
        level: int32, number of stages in which the position has keys.
        selected: int32, last boundary at which this step selected it.
        scale: fp32, what its hidden state in an FP8 Aux Cache is to be multiplied by.
        place: int32, which of the prompt's slots in the Aux Cache is the position's.
    """

    score: torch.Tensor
    rank: torch.Tensor
    level: torch.Tensor
    selected: torch.Tensor
    scale: torch.Tensor
    place: torch.Tensor
    pages: Pages

    @classmethod
    def of_buffer(cls, words: torch.Tensor, pages: Pages) -> "PromptState":
        """``words``: the flat int32 buffer from the group's first page on."""
        size = pages.positions_per_slot
        score, rank, level, selected, scale, place = (words[n * size :] for n in range(PLANES))
        floats = (score.view(torch.float32), scale.view(torch.float32))
        return cls(floats[0], rank, level, selected, floats[1], place, pages)

    @classmethod
    def none(cls, batch: int, device: torch.device) -> "PromptState":
        """For a model in which no prompt is pruned: addresses that nothing reads."""
        table = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        pages = Pages(table, 1, 1, PLANES, 1, page_stride=PLANES, block_stride=PLANES)
        return cls.of_buffer(torch.zeros(PLANES, dtype=torch.int32, device=device), pages)

    def at(self, request: torch.Tensor | int, position: torch.Tensor) -> torch.Tensor:
        """Where positions (int64) of requests (batch indices) are in each plane; int64."""
        size = self.pages.positions_per_slot
        return self.pages.slot_address(request, position // size) + position % size

    def prompt_at(self, request: int, num_prompt: torch.Tensor) -> torch.Tensor:
        """``at`` for the whole prompt, in order of position."""
        positions = torch.arange(int(num_prompt[request]), device=self.rank.device)
        return self.at(request, positions)


@dataclass(frozen=True)
class AuxCache:
    """Hidden states of dropped tokens.

    Attributes:
        buffer: flat, in the model's dtype or FP8 (e4m3), from the group's first page on.
        num_prompt: ``[batch]`` int32.
        state_room: ``[batch]`` int32, positions for whose state there is room.
        state: of the same prompts, in the same pages.
    """

    buffer: torch.Tensor
    num_prompt: torch.Tensor
    state_room: torch.Tensor
    pages: Pages
    state: PromptState

    def at(self, request: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """First element of each hidden state, int64; ``request`` holds batch indices."""
        request, position = request.long(), position.long()
        size = self.pages.positions_per_slot
        state_slots = (self.state_room[request].long() + size - 1) // size
        place = self.state.place[self.state.at(request, position)].long()
        return self.pages.slot_address(request, state_slots + place)


@triton.jit
def _slot_address(
    block,
    slot,
    page_stride,
    block_stride,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
):
    page = (slot // PER_PAGE % PAGES).to(tl.int64)
    return block.to(tl.int64) * block_stride + page * page_stride + slot % PER_PAGE * SLOT_SIZE


@triton.jit
def state_at(
    block_table_row,
    position,
    mask,
    page_stride,
    block_stride,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
):
    """Where positions of a request are in each plane of the prompt state."""
    slot = position // PER_SLOT
    block = tl.load(block_table_row + slot // (PAGES * PER_PAGE), mask=mask, other=0)
    first = _slot_address(block, slot, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE)
    return first + position % PER_SLOT


@triton.jit
def aux_at(
    block_table_row,
    state_room,
    place,
    page_stride,
    block_stride,
    PAGES: tl.constexpr,
    PER_PAGE: tl.constexpr,
    SLOT_SIZE: tl.constexpr,
    PER_SLOT: tl.constexpr,
):
    """First element of a hidden state of a request, by its place."""
    slot = tl.cdiv(state_room, PER_SLOT) + place
    block = tl.load(block_table_row + slot // (PAGES * PER_PAGE))
    return _slot_address(block, slot, page_stride, block_stride, PAGES, PER_PAGE, SLOT_SIZE)
