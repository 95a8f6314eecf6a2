"""What the pieces of CUDA graphs read of their rows: at one place, whichever rows they run."""

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from lazyllm_vllm.runtime.step import Step


class PieceRows:
    """Attributes:
    positions: ``[rows]`` int64.
    slots: ``[groups, rows]`` int64, where a group's layers write keys and values; -1: nowhere.
    is_padding: ``[rows]`` bool, whether nobody's token is in a row; experts pass over it.
    """

    def __init__(self, num_groups: int, most_rows: int, device: torch.device) -> None:
        self.positions = torch.zeros(most_rows, dtype=torch.int64, device=device)
        self.slots = torch.full((num_groups, most_rows), -1, dtype=torch.int64, device=device)
        self.is_padding = torch.ones(most_rows, dtype=torch.bool, device=device)

    def fill(self, step: "Step", stage: int) -> None:
        """With the rows of a step's stage; those behind them are padding."""
        rows = step.num_rows(stage)
        self.positions[:rows] = step.positions(stage)[:rows]
        self.slots[:, :rows] = step.slot_mappings(stage)[:, :rows]
        self.slots[:, rows:] = -1
        self.is_padding[rows:] = True
        if stage and not step.is_plain:
            torch.lt(step.rows[stage].request[:rows], 0, out=self.is_padding[:rows])
        else:
            self.is_padding[:rows] = False
