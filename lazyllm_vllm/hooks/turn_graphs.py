"""CUDA graphs of steps with a turn: a conversation's next message, or a question about a document.

Its few tokens keep the GPU busy for some milliseconds, and starting every layer's kernels one by
one keeps the CPU busy for longer. So turns, alone or beside decodes, run in one graph, padded to a
shape that was captured at start. What the graph reads of a step, but for what lies in
``StepBuffers``, is copied to where the captured step has it.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.config import VllmConfig
from vllm.distributed.parallel_state import graph_capture
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backends.utils import PAD_SLOT_ID

from lazyllm_vllm.hooks.engine_config import full_layers
from lazyllm_vllm.plan.request_setting import DEEP
from lazyllm_vllm.runtime.prefill_rows import Prefills
from lazyllm_vllm.runtime.step import Batch, Step
from lazyllm_vllm.runtime.step_kind import StepKind
from lazyllm_vllm.runtime.turns import Turns, TurnShape

if TYPE_CHECKING:
    from lazyllm_vllm.hooks.model_state import LazyModelState

# Decodes beside one turn, and rows of its tokens.
DECODES, ROWS = (0, 8, 32, 64, 128), (64, 128, 192, 256, 384, 512)
# Of steps with several: how many, decodes beside them, and rows of each on average.
TURNS, OF_SEVERAL, ROWS_EACH = (2, 4, 8), (0, 32, 128), (128, 192)


def has_turn_graphs(vllm_config: VllmConfig, state: "LazyModelState") -> bool:
    """Whether turns can run in graphs. Not where the work depends on numbers that only the step
    has: an FP8 cache and sliding windows behind the first stage copy as many keys as there are,
    experts pass over rows that vLLM names, and ranks reduce as many scores as prompts have."""
    config, layers = state.schedule.config, vllm_config.compilation_config.static_forward_context
    return (
        config.reuse == DEEP
        and config.score_window > 1
        and state.schedule.has_aux
        and vllm_config.parallel_config.world_size == 1
        and not vllm_config.model_config.is_moe
        and not any(layers[name].impl.is_fp8 for name in state.model.layer_names)
        and full_layers(vllm_config.model_config) is None
    )


@dataclass(frozen=True)
class _Captured:
    """Attributes:
    step: as it was captured, and its ``fixed_numbers``; input_ids: ``[rows]``, which its graph
        reads.
    output: ``[requests of the batch, hidden]``, which it writes.
    """

    graph: torch.cuda.CUDAGraph
    step: Step
    numbers: tuple
    input_ids: torch.Tensor
    output: torch.Tensor


def all_shapes() -> list[TurnShape]:
    of_one = [TurnShape(1, decodes, rows) for decodes in DECODES for rows in ROWS]
    return of_one + [
        TurnShape(turns, decodes, turns * rows)
        for turns in TURNS
        for decodes in OF_SEVERAL
        for rows in ROWS_EACH
    ]


class TurnGraphs:
    """By shape, what was captured."""

    def __init__(self) -> None:
        self._captured: dict[TurnShape, _Captured] = {}

    def shape(self, num_turns: int, num_decodes: int, num_rows: int) -> TurnShape | None:
        """The least that holds so much; None: there is none."""
        fits = (s for s in self._captured if s.turns >= num_turns and s.rows >= num_rows)
        fits = (s for s in fits if s.decodes >= num_decodes)
        # Turns alone bring no decodes to a graph that has them.
        return min((s for s in fits if bool(s.decodes) == bool(num_decodes)), default=None)

    def capture(self, state: "LazyModelState", vllm_config: VllmConfig, pool) -> None:
        """Capture every shape that the engine's limits allow, the largest first, whose memory the
        others use again.

        Args:
            pool: memory of vLLM's CUDA graphs.
        """
        most_rows = min(vllm_config.scheduler_config.max_num_batched_tokens, state.max_model_len)
        with graph_capture(device=state.device):
            for shape in sorted(all_shapes(), key=lambda s: s.num_rows, reverse=True):
                rows = shape.num_rows
                if shape.num_requests > state.max_num_reqs or rows > most_rows:
                    continue
                step = made_up_step(state, shape)
                ids = torch.zeros(rows, dtype=torch.int32, device=state.device)
                with set_forward_context(state.metadata_of(step), vllm_config, num_tokens=rows):
                    state.model.run_step(ids, step.batch.positions)
                    graph = torch.cuda.CUDAGraph()
                    step.forget()
                    with torch.cuda.graph(graph, pool=pool):
                        output = state.model.run_step(ids, step.batch.positions)
                numbers = fixed_numbers(step)
                self._captured[shape] = _Captured(graph, step, numbers, ids, output)

    def run(self, step: Step, input_ids: torch.Tensor) -> torch.Tensor:
        """A step of one of the shapes.

        Args:
            input_ids: ``[rows]``.

        Returns:
            ``[requests of the batch, hidden]``, until the next step.
        """
        captured = self._captured[step.batch.shape]
        assert fixed_numbers(step) == captured.numbers
        mine, theirs = step.batch, captured.step.batch
        captured.input_ids.copy_(input_ids)
        theirs.positions.copy_(mine.positions)
        theirs.slot_mappings.copy_(mine.slot_mappings)
        captured.step.uploaded.copy_(step.uploaded)
        captured.graph.replay()
        return captured.output


def fixed_numbers(step: Step) -> tuple:
    """What a graph has of a step that the CPU knows, and that is the same for all of a shape."""
    stages = range(step.schedule.num_stages)
    return (
        [step.num_rows(stage) for stage in stages],
        [step.num_decode_rows(stage) for stage in stages],
        [step.continues(stage) for stage in stages],
        [step.prefills_score(stage) for stage in stages],
        (step.num_decodes, step.num_turns, step.num_prefills, len(step.uploaded)),
        (step.turn_quota, step.max_revived, step.lists, step.decodes_select),
        step.prefills_select,
    )


def made_up_step(state: "LazyModelState", shape: TurnShape) -> Step:
    """A step with turns that there are not, to be captured: as any of its shape, and as long as
    any may be."""
    stages, device, count = state.schedule.num_stages, state.device, shape.turns
    rows = shape.rows // count
    seeing = min(state.schedule.config.score_window, rows)
    end = np.array([state.max_model_len - seeing, state.max_model_len] * count, np.int32)
    first = end - np.array([rows - seeing, seeing] * count, np.int32)
    prefills = Prefills.whole(end.tolist(), stages)
    sees = np.array([False, True] * count)
    prefills = replace(prefills, first=first, caught_up=first, sees_revived=sees)
    prefills = prefills.padded([shape.rows - count * rows])
    groups = len(state.buffers.slot_mappings)
    turns = Turns(
        tokens=np.full(count, seeing, np.int32),
        last_rows=shape.num_decodes + rows * np.arange(1, count + 1, dtype=np.int32) - 1,
        ends=np.full(count, state.max_model_len, np.int32),
        revived=np.zeros((stages, count), np.int32),
        sees=prefills.sees_revived,
        seen=np.zeros((stages, len(prefills.end)), np.int32),
        leads=np.zeros(len(prefills.end), bool),
        requests=np.full(shape.num_requests, -1),
        rows=torch.full((shape.num_rows,), -1, device=device),
        sampled=torch.arange(shape.num_requests, device=device),
        shape=shape,
    )
    batch = Batch(
        req_ids=[""] * shape.num_requests,
        num_decodes=shape.num_decodes,
        prefills=prefills,
        positions=torch.zeros(shape.num_rows, dtype=torch.int64, device=device),
        sampled_tokens=turns.sampled,
        slot_mappings=torch.full((groups, shape.num_rows), PAD_SLOT_ID, device=device),
        turns=turns,
    )
    state.buffers.clear_index(shape.num_requests)
    step = Step(StepKind.CAPTURE_TURN, batch, state.schedule, state.buffers, selects=True)
    step.longest_prefill = step.longest_request = [shape.rows] * stages
    step.longest_keys = [state.max_model_len] * stages
    return step
