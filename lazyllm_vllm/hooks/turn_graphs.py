"""CUDA graphs of steps with a turn: a conversation's next message, or a question about a document.

Its few tokens keep the GPU busy for some milliseconds, and starting every layer's kernels one by
one keeps the CPU busy for longer. So one turn, alone or beside decodes, runs in one graph, padded
to a shape that was captured at start. What the graph reads of a step, but for what lies in
``StepBuffers``, is copied to where the captured step has it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context

from lazyllm_vllm.hooks.engine_config import full_layers
from lazyllm_vllm.hooks.step_plans import turn_step
from lazyllm_vllm.runtime.step import Step
from lazyllm_vllm.runtime.turns import TurnShape

if TYPE_CHECKING:
    from lazyllm_vllm.hooks.model_state import LazyModelState
    from lazyllm_vllm.models.staged import StagedDecoder

# Of each shape: decodes beside the turn, and rows of its tokens but the last.
DECODES = (0, 8, 32)
ROWS = (32, 64, 128, 192, 256, 320, 384, 512)


def has_turn_graphs(vllm_config: VllmConfig, state: "LazyModelState") -> bool:
    """Whether turns can run in graphs. Not where the work depends on numbers that only the step
    has: an FP8 cache and sliding windows behind the first stage copy as many keys as there are,
    experts pass over rows that vLLM names, ranks reduce as many scores as prompts have, and a trace
    looks at every boundary."""
    config = state.schedule.config
    return (
        state.schedule.has_aux
        and state.trace is None
        and config.score_window > 1
        and vllm_config.cache_config.enable_prefix_caching
        and vllm_config.parallel_config.world_size == 1
        and not vllm_config.model_config.is_moe
        and not vllm_config.cache_config.cache_dtype.startswith("fp8")
        and full_layers(vllm_config.model_config) is None
    )


@dataclass(frozen=True)
class _Captured:
    """Attributes:
    step: as it was captured; input_ids: ``[rows]``, which its graph reads.
    output: ``[requests of the batch, hidden]``, which it writes.
    """

    graph: torch.cuda.CUDAGraph
    step: Step
    input_ids: torch.Tensor
    output: torch.Tensor


class TurnGraphs:
    """By shape, what was captured."""

    def __init__(self) -> None:
        self._captured: dict[TurnShape, _Captured] = {}

    def shape(self, num_decodes: int, num_rows: int) -> TurnShape | None:
        """The least that holds so much; None: there is none."""
        fits = (s for s in self._captured if s.decodes >= num_decodes and s.rows >= num_rows)
        # A turn alone brings no decodes to a graph that has them.
        return min((s for s in fits if bool(s.decodes) == bool(num_decodes)), default=None)

    def capture(
        self, model: "StagedDecoder", state: "LazyModelState", vllm_config: VllmConfig, pool
    ) -> None:
        """Capture every shape that the engine's limits allow, the largest first, whose memory the
        others use again.

        Args:
            pool: memory of vLLM's CUDA graphs.
        """
        most_rows = min(vllm_config.scheduler_config.max_num_batched_tokens, state.max_model_len)
        shapes = [TurnShape(decodes, rows) for decodes in DECODES for rows in ROWS]
        with graph_capture(device=state.device):
            for shape in sorted(shapes, key=sum, reverse=True):
                if shape.decodes + 4 > state.max_num_reqs or sum(shape) + 1 > most_rows:
                    continue
                step = turn_step(state, shape)
                rows = len(step.batch.positions)
                ids = torch.zeros(rows, dtype=torch.int32, device=state.device)
                with set_forward_context(state.metadata_of(step), vllm_config, num_tokens=rows):
                    model.run_step(ids, step.batch.positions)
                    graph = torch.cuda.CUDAGraph()
                    step.forget()
                    with torch.cuda.graph(graph, pool=pool):
                        output = model.run_step(ids, step.batch.positions)
                self._captured[shape] = _Captured(graph, step, ids, output)

    def run(self, model: "StagedDecoder", step: Step, input_ids: torch.Tensor) -> torch.Tensor:
        """A step of one of the shapes.

        Args:
            input_ids: ``[rows]``.

        Returns:
            ``[requests of the batch, hidden]``, until the next step.
        """
        captured = self._captured[step.batch.turns.shape]
        mine, theirs = step.batch, captured.step.batch
        captured.input_ids.copy_(input_ids)
        theirs.positions.copy_(mine.positions)
        theirs.slot_mappings.copy_(mine.slot_mappings)
        captured.step.uploaded.copy_(step.uploaded)
        captured.graph.replay()
        return captured.output
