"""A worker's side of requests that go on from a snapshot: blocks copied on the device, and the
counts of requests that left one."""

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.runtime.request_table import RequestRow, RowCopy

# Bytes copied at once, which are held twice meanwhile.
MOST_COPIED = 64 << 20


class BlockCopier:
    """Copies whole blocks of the KV cache's backing buffer, whichever group has them.

    Attributes:
        blocks: ``[blocks, pages, words]`` int32.
        slot_position: ``[blocks, block_size]`` int32, positions of the keys in each block.
    """

    def __init__(self, blocks: torch.Tensor, slot_position: torch.Tensor) -> None:
        self.blocks = blocks
        self.slot_position = slot_position.view(len(blocks), -1)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """``(source, destination)`` block ids; no block is both."""
        if not pairs:
            return
        source, destination = async_tensor_h2d(np.array(pairs).T, device=self.blocks.device)
        at_once = max(MOST_COPIED // self.blocks[0].nbytes, 1)
        for mine, theirs in zip(destination.split(at_once), source.split(at_once)):
            self.blocks[mine] = self.blocks[theirs]
            self.slot_position[mine] = self.slot_position[theirs]


class EndedRequests:
    """Rows of the request table of pruned requests that ended, by the first block that each had in
    the prompt's group: as long as nobody else has that block, its snapshot may be there."""

    def __init__(self) -> None:
        self._rows: dict[int, RequestRow] = {}
        self._copies: dict[int, RowCopy] = {}

    def add(self, block: int, row: torch.Tensor) -> None:
        """``row``: as ``RequestTable.row`` gives it."""
        for at in [at for at, copy in self._copies.items() if copy.is_here]:
            self._rows[at] = self._copies.pop(at).read()
        self._copies[block] = RowCopy(row)

    def row(self, block: int) -> RequestRow:
        """Waits only for a request that ended a moment ago."""
        if block in self._copies:
            self._rows[block] = self._copies.pop(block).read()
        return self._rows[block]
