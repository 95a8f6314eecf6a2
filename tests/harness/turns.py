"""Turns in CUDA graphs where there are none: their batches are padded to the graphs' shapes, and
find what the step before left where a graph would."""

import torch

from lazyllm_vllm.hooks.turn_graphs import TurnGraphs, fixed_numbers, made_up_step
from lazyllm_vllm.runtime.turns import TurnShape

DECODES, ROWS = (0, 1, 4), (16, 33, 64)
SEVERAL = [TurnShape(2, 0, 80), TurnShape(4, 0, 110), TurnShape(4, 2, 120)]


class TurnsOnCPU(TurnGraphs):
    """Runs what it would replay.

    Attributes:
        ran: the shapes, in order.
    """

    def __init__(self, state) -> None:
        self.ran: list[TurnShape] = []
        shapes = [TurnShape(1, decodes, rows) for decodes in DECODES for rows in ROWS]
        shapes = [shape for shape in shapes + SEVERAL if shape.num_requests <= state.max_num_reqs]
        self._captured = {shape: fixed_numbers(made_up_step(state, shape)) for shape in shapes}
        self.buffers, self.model = state.buffers, state.model

    def run(self, step, input_ids: torch.Tensor) -> torch.Tensor:
        shape = step.batch.shape
        assert fixed_numbers(step) == self._captured[shape]
        assert len(input_ids) == sum(shape)
        self.ran.append(shape)
        # As if every row had been the first request's last one, in slots that there are.
        rows = self.buffers.all_rows
        for poisoned in (rows.request, rows.source, rows.slot, rows.position):
            poisoned.fill_(3)
        return self.model.run_step(input_ids, step.batch.positions)
