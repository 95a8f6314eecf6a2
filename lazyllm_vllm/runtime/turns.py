"""What a step's plan knows of its turns; see ``hooks.turns``."""

from typing import NamedTuple

import numpy as np
import torch


class TurnShape(NamedTuple):
    """What a step with turns has in a CUDA graph, padding included.

    Attributes:
        turns: how many.
        decodes: rows of other requests that decode.
        rows: of the turns' tokens, in stage 0.
    """

    turns: int
    decodes: int
    rows: int

    @property
    def num_decodes(self) -> int:
        """With the turns' last tokens."""
        return self.turns + self.decodes

    @property
    def num_requests(self) -> int:
        """Of the batch: a turn has two prefills, and one is nobody's."""
        return self.num_decodes + 2 * self.turns + 1

    @property
    def num_rows(self) -> int:
        """In stage 0."""
        return self.num_decodes + self.rows


class Turns(NamedTuple):
    """Requests that go on from what others left, and whose prompt ends in this step.

    Attributes:
        tokens: ``[turns]`` int32, of each how many of its last tokens see what it revives.
        last_rows: ``[turns]`` int32, of each the prefill's row that is its last token in stage 0;
            -1: the decode's is, and the prefill's does the same. Also of those of padding.
        ends: ``[turns]`` int32, the position before which it may revive.
        revived: ``[stages, turns]`` int32, tokens that it revives.
        sees: ``[prefills]`` bool, which of the batch's prefills see what their turn revives.
        seen: ``[stages, prefills]`` int32, how many these are; 0 of others.
        leads: ``[prefills]`` bool, which have the tokens of a long turn before those: some of them
            are dropped.
        requests: ``[requests of the batch]``, which of vLLM's each is: some come twice or
            three times; -1: none, of padding.
        rows: ``[rows]`` int64, which of vLLM's each row of the batch is; -1: none.
        sampled: ``[vLLM's requests]`` int64, where in the batch each is sampled from.
        shape: as which the batch is padded; None: it is not.
    """

    tokens: np.ndarray
    last_rows: np.ndarray
    ends: np.ndarray
    revived: np.ndarray
    sees: np.ndarray
    seen: np.ndarray
    leads: np.ndarray
    requests: np.ndarray
    rows: torch.Tensor
    sampled: torch.Tensor
    shape: TurnShape | None = None

    @classmethod
    def made_up(cls, num_stages: int, batch) -> "Turns":
        """One, the first of vLLM's ``InputBatch``, which revives nothing and which no prefill
        sees."""
        count, device = batch.num_reqs, batch.positions.device
        one, revived = np.ones(1, np.int32), np.zeros((num_stages, 1), np.int32)
        none = np.zeros(0, bool)
        no_prefills = none, np.zeros((num_stages, 0), np.int32), none
        rows = torch.arange(batch.num_tokens, device=device)
        return cls(one, one, one, revived, *no_prefills, np.arange(count), rows, rows[:count])
