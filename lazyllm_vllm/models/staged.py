"""The staged forward: vLLM's own forward of a decoder, whose layers run on their stage's rows."""

import inspect
from dataclasses import replace
from functools import partial

import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context

from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.hooks.attention_layer import StagedAttention
from lazyllm_vllm.hooks.cuda_graphs import between_graphs, captures_pieces
from lazyllm_vllm.hooks.engine_config import schedule_of
from lazyllm_vllm.hooks.patches import install_in_worker
from lazyllm_vllm.hooks.prompt_cache import add_pages
from lazyllm_vllm.hooks.stage_pieces import StagePieces
from lazyllm_vllm.models.decoder_layer import attention_of, decoder_layers
from lazyllm_vllm.models.families import UNTESTED, Family, family_of
from lazyllm_vllm.models.rotary import take_rotary
from lazyllm_vllm.models.sampled_rows import sampled_rows, to_token_layout
from lazyllm_vllm.models.small_ops import SmallOps
from lazyllm_vllm.models.step_tokens import step_tokens
from lazyllm_vllm.runtime.step_kind import StepKind


class StagedDecoder:
    """Mix-in before one of vLLM's causal language models; ``models.registry`` joins the two.

    The model's code is not touched: its forward calls layer after layer, and each layer is handed
    the rows of its stage instead of what the layer before it gave.

    Attributes:
        stage_positions: positions of the rows in the stage that is running, ``[rows]``; None where
            every layer has the rows that vLLM gives.
        pieces: of CUDA graphs, for stages of few rows; None: they cannot run in any. Rows must need
            no position but in attention.
        turn_graphs: CUDA graphs of steps with a turn; None: there are none.
        is_done: whether the stage that is running has run, in pieces or in earlier steps.
        is_over: whether no row is left to run in this step.
        output: what the last stage gave, if it ran in pieces.
        plain_forwards: the layers' own, as their model has them.
        has_experts: whether rows are routed to experts, which pass over those marked as padding.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.schedule = schedule_of(vllm_config)
        self.small_ops = None
        self._begin_step(None)
        self.has_experts = vllm_config.model_config.is_moe
        model = type(self).__mro__[2]
        family = family_of(model.__module__, model.__name__) or UNTESTED
        layers = decoder_layers(self)
        self.plain_forwards = []
        rotates = True
        for index, layer in enumerate(layers):
            rotary = take_rotary(layer, family.rotary)
            rotates = rotates and rotary is not None
            StagedAttention.adopt(attention_of(layer), rotary, self.schedule, index, vllm_config)
            self.plain_forwards.append(layer.forward)
            layer.forward = self._in_stages(layer, index)
        self.turn_graphs = None
        self.pieces = StagePieces() if self.schedule.prunes and rotates else None
        self._cut_rows_of(layers[-1], family)
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            self.small_ops = SmallOps(self.model)
        attention = [attention_of(layer) for layer in layers]
        self.layer_names = [module.layer_name for module in attention]
        install_in_worker()
        if self.schedule.prunes:
            add_pages(vllm_config, attention[0])

    @staticmethod
    def get_model_state_cls():
        from lazyllm_vllm.hooks.model_state import LazyModelState

        return LazyModelState

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        intermediate_tensors=None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the stages.

        Args:
            input_ids, positions: ``[num_tokens]``.

        Returns:
            ``[num_tokens, hidden]``; only the rows that are sampled from are written.
        """
        metadata = _stage_metadata()
        self._begin_step(metadata)
        if metadata is None:  # vLLM's memory profile
            return super().forward(input_ids, positions)
        if captures_pieces():
            return self._capture(input_ids, positions)
        if metadata.step.batch.shape is not None:
            turns = metadata.step.batch.turns
            hidden = self.turn_graphs.run(metadata.step, input_ids[turns.rows])[turns.sampled]
            return to_token_layout(hidden, metadata.step, metadata.boundary, len(input_ids))
        _begin()
        with step_tokens(metadata.step, input_ids, positions) as (self.input_ids, positions):
            hidden = super().forward(self.input_ids, positions)
        if self.output is not None:
            return to_token_layout(self.output, metadata.step, metadata.boundary, len(input_ids))
        if self.is_over:
            return hidden.new_zeros(len(input_ids), hidden.shape[1])
        return to_token_layout(hidden, metadata.step, metadata.boundary, len(input_ids))

    def run_step(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """A step as it is planned, not in pieces.

        Args:
            input_ids, positions: ``[rows]``, in the plan's order.

        Returns:
            ``[sampled rows, hidden]``; see ``sampled_rows``.
        """
        self._begin_step(_stage_metadata())
        _begin()
        return super().forward(input_ids, positions)

    def _begin_step(self, metadata: StageMetadata | None) -> None:
        if self.small_ops:
            self.small_ops.recorded = metadata is not None and metadata.step.kind.is_recorded
        self.stage_positions = self.input_ids = self.output = None
        self.is_done = self.is_over = False

    def _capture(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """The forward in pieces, as they are captured."""
        between_graphs(_begin_pieces)
        if self.has_experts:
            piece_rows = _stage_metadata().boundary.buffers.piece_rows
            get_forward_context().is_padding = piece_rows.is_padding[: len(input_ids)]
        if self.pieces is None:
            return super().forward(input_ids, positions)
        self.pieces.begin(input_ids)
        self.pieces.mark()
        hidden = super().forward(input_ids, positions)
        self.pieces.end(hidden)
        return hidden

    def _in_stages(self, layer: torch.nn.Module, index: int):
        """The forward of decoder layer ``index``, on the rows of its stage."""
        forward, names = layer.forward, list(inspect.signature(layer.forward).parameters)
        stage = self.schedule.stage_of(index)
        is_first = index == self.schedule.starts[stage]

        def staged(*args, **kwargs):
            given = dict(zip(names, args), **kwargs)
            if is_first and not self.is_over:
                self.is_done = False
                if stage:
                    self._cross(stage, given)
                self._run_pieces(stage, given)
            if self.is_over or self.is_done:
                hidden = given["hidden_states"]
                return (hidden, given["residual"]) if "residual" in given else hidden
            if self.stage_positions is not None:
                given["positions"] = self.stage_positions
            return forward(**given)

        return staged

    def _cross(self, stage: int, given: dict) -> None:
        """Carry what a stage's first layer is given over the boundary. Where a graph is captured in
        pieces, nothing is dropped at its replays."""
        metadata = _stage_metadata()
        if metadata is None:
            return
        hidden, residual = given["hidden_states"], given.get("residual")
        if captures_pieces():
            states = (hidden,) if residual is None else (hidden, residual)
            between_graphs(partial(_cross_without_drops, stage), *states)
            if self.pieces is not None:
                self.pieces.mark(*states)
            return
        step, boundary = metadata.step, metadata.boundary
        hidden, residual = boundary.leave(step, stage, hidden, residual)
        boundary.recount(step, stage)
        self._run_parts(stage, hidden, given)
        if not step.num_rows(stage):
            self.is_over = not any(map(step.num_rows, range(stage, self.schedule.num_stages)))
            if not self.is_over:  # rows of the stage have run in steps before
                self.is_done = True
                given |= {name: given[name][:0] for name in _states(given)}
            return
        hidden, residual = boundary.enter(step, stage, hidden, residual)
        given["hidden_states"] = hidden
        if "residual" in given:
            given["residual"] = residual
        if step.is_plain:
            return
        rows = slice(0, step.num_rows(stage))
        self.stage_positions = boundary.buffers.rows[stage].position[rows]
        if self.has_experts:
            get_forward_context().is_padding = boundary.buffers.rows[stage].request[rows] < 0

    def _run_pieces(self, stage: int, given: dict) -> None:
        """Run a stage in pieces, if there are some for its rows."""
        metadata = _stage_metadata()
        if self.pieces is None or metadata is None or captures_pieces():
            return
        if self.is_over or self.is_done:
            return
        step, rows = metadata.step, metadata.step.num_rows(stage)
        if step.kind is not StepKind.RUN or not self.pieces.covers(rows, self.input_ids):
            return
        metadata.boundary.buffers.piece_rows.fill(step, stage)
        names = _states(given)
        after = self.pieces.run(stage, rows, tuple(given[name] for name in names))
        if stage + 1 < self.schedule.num_stages:
            given |= dict(zip(names, after))
            self.is_done = True
            return
        # Out of the graphs' memory: the model's last norm still runs, on what nobody reads.
        self.output = after[0][sampled_rows(step, metadata.boundary)].clone()
        given |= dict.fromkeys(names, given["hidden_states"])
        self.is_over = True

    def _run_parts(self, stage: int, hidden: torch.Tensor, given: dict) -> None:
        """Run what a step's plan has run before the rest: in turn, each part through its stages.

        Args:
            hidden: rows of the stage before.
            given: what the stage's first layer was given.
        """
        context, metadata = get_forward_context(), _stage_metadata()
        step, boundary, num_stages = metadata.step, metadata.boundary, self.schedule.num_stages
        parts = [(span, stage + 1) for span in step.plan.parts[stage]]
        if stage == 1:
            parts = [(span, num_stages) for span in step.plan.catch_up] + parts
        if not parts:
            return
        all_metadata = context.attn_metadata
        for span, end in parts:
            part = step.part(span)
            of_part = {id(m): replace(m, step=part) for m in all_metadata.values()}
            context.attn_metadata = {name: of_part[id(m)] for name, m in all_metadata.items()}
            states, _ = boundary.enter(part, stage, hidden, None, main=step)
            states = self._run_layers(part, range(stage, end), states, given)
            if end < num_stages:
                boundary.leave_part(part, stage, states)
        context.attn_metadata = all_metadata
        step.show()

    def _run_layers(self, part, stages: range, hidden: torch.Tensor, given: dict) -> torch.Tensor:
        """Rows that change in no boundary, through the layers of these stages."""
        boundary, residual = _stage_metadata().boundary, None
        rows = slice(0, len(hidden))
        for stage in stages:
            if stage > stages.start:
                boundary.place(part, stage)
            own = part.rows[stage]
            if self.has_experts:
                get_forward_context().is_padding = own.request[rows] < 0
            for layer in self.schedule.stage_layers(stage):
                inner = given | {"hidden_states": hidden, "positions": own.position[rows]}
                if "residual" in given:
                    inner["residual"] = residual
                result = self.plain_forwards[layer](**inner)
                hidden, residual = result if isinstance(result, tuple) else (result, None)
        return hidden if residual is None else hidden + residual

    def _cut_rows_of(self, last_layer: torch.nn.Module, family: Family) -> None:
        """Have what follows the last attention run on the sampled rows; see ``sampled_rows``."""
        module = self.model.norm
        if family.after_attention is not None:
            module = last_layer.get_submodule(family.after_attention)
        module.register_forward_pre_hook(self._cut_to_sampled_rows)

    def _cut_to_sampled_rows(self, module: torch.nn.Module, args: tuple) -> tuple | None:
        """The rows that are sampled from, of each of the arguments."""
        context, metadata = get_forward_context(), _stage_metadata()
        if metadata is None or captures_pieces():
            return None
        rows = sampled_rows(metadata.step, metadata.boundary)
        if not metadata.step.num_rows(self.schedule.num_stages - 1):
            return None
        if self.has_experts and context.is_padding is not None:
            context.is_padding = context.is_padding[rows]
        return tuple(states[rows] for states in args)


def _states(given: dict) -> list[str]:
    """Which of a layer's arguments are handed on from the layer before."""
    return ["hidden_states", "residual"][: 1 + ("residual" in given)]


def _stage_metadata() -> StageMetadata | None:
    """That of the first layer; None: there are no requests."""
    metadata = get_forward_context().attn_metadata
    return next(iter(metadata.values())) if metadata else None


def _begin() -> None:
    metadata = _stage_metadata()
    metadata.boundary.begin(metadata.step)


def _begin_pieces() -> None:
    _begin()
    metadata = _stage_metadata()
    metadata.boundary.buffers.piece_rows.fill(metadata.step, 0)


def _cross_without_drops(
    stage: int, hidden: torch.Tensor, residual: torch.Tensor | None = None
) -> None:
    metadata = _stage_metadata()
    step, boundary = metadata.step, metadata.boundary
    assert step.drops_nothing
    rows = slice(0, step.num_rows(stage - 1))
    hidden, residual = hidden[rows], residual if residual is None else residual[rows]
    boundary.enter(step, stage, *boundary.leave(step, stage, hidden, residual))
    if not step.is_plain:  # whose rows have the same places in all stages
        boundary.buffers.piece_rows.fill(step, stage)
