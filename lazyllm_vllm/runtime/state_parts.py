"""Tensor parallelism: each rank parks a part of every hidden state, which all of them have whole.

So a hidden state takes as much of each rank's cache as a share of its keys does. At a boundary the
ranks put together what they fetch.
"""

import torch

from vllm.distributed.parallel_state import GroupCoordinator

from lazyllm_vllm.plan.grouping import part_width
from lazyllm_vllm.runtime.collectives import all_gather


class StateParts:
    def __init__(self, group: GroupCoordinator, hidden_size: int) -> None:
        """``group``: of all ranks."""
        self.group = group
        self.width = part_width(hidden_size, group.world_size)
        self.is_whole = self.width == hidden_size

    def mine(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """This rank's part (``[rows, width]``) of ``states`` (``[rows, hidden]``)."""
        if states is None or self.is_whole:
            return states
        first = self.group.rank_in_group * self.width
        return states[:, first : first + self.width].contiguous()

    def whole(self, part: torch.Tensor) -> torch.Tensor:
        """Hidden states (``[rows, hidden]``) of the ranks' parts. All ranks call it, with the same
        number of rows."""
        if self.is_whole:
            return part
        ranks, rows = self.group.world_size, len(part)
        parts = part.new_empty(ranks * rows, self.width)
        if rows:
            all_gather(self.group, parts, part)
        parts = parts.view(ranks, rows, self.width)
        return parts.movedim(0, 1).reshape(rows, ranks * self.width)
