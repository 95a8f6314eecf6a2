"""Turns in CUDA graphs where there are none: their batches are padded to the graphs' shapes."""

import torch

from lazyllm_vllm.runtime.turns import TurnShape

DECODES, ROWS = (0, 4), (16, 33, 64)


class TurnsOnCPU:
    """``hooks.turn_graphs.TurnGraphs``, which run what they would replay.

    Attributes:
        ran: the shapes, in order.
    """

    def __init__(self) -> None:
        self.ran: list[TurnShape] = []

    def shape(self, num_decodes: int, num_rows: int) -> TurnShape | None:
        from lazyllm_vllm.hooks.turn_graphs import TurnGraphs

        graphs = TurnGraphs()
        graphs._captured = {TurnShape(d, r): None for d in DECODES for r in ROWS}
        return graphs.shape(num_decodes, num_rows)

    def run(self, model, step, input_ids: torch.Tensor) -> torch.Tensor:
        self.ran.append(step.batch.turns.shape)
        assert len(input_ids) == 1 + sum(self.ran[-1])
        return model.run_step(input_ids, step.batch.positions)
