"""The staged forward: any decoder whose layers are ``layer(positions, hidden, residual)``."""

from functools import partial

import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.hooks.attention_layer import StagedAttention
from lazyllm_vllm.hooks.cuda_graphs import between_graphs, captures_pieces
from lazyllm_vllm.hooks.engine_config import schedule_of
from lazyllm_vllm.hooks.patches import install_in_worker
from lazyllm_vllm.hooks.prompt_cache import add_prompt_pages
from lazyllm_vllm.models.families import family_of
from lazyllm_vllm.models.rotary import take_rotary
from lazyllm_vllm.models.sampled_rows import sampled_rows, to_token_layout
from lazyllm_vllm.models.small_ops import SmallOps


class StagedDecoder:
    """Mix-in for a vLLM causal language model with ``self.model.embed_input_ids``,
    ``self.model.layers`` and ``self.model.norm``.

    Call ``cut_into_stages`` at the end of ``__init__`` and put the mix-in before the model's class.
    """

    def cut_into_stages(self, vllm_config: VllmConfig) -> None:
        """Give every decoder layer its stage, and what is private to a prompt its place."""
        layers = self.model.layers
        self.schedule = schedule_of(vllm_config)
        attention = [
            next(m for m in layer.modules() if isinstance(m, Attention)) for layer in layers
        ]
        for index, (layer, module) in enumerate(zip(layers, attention)):
            StagedAttention.adopt(module, take_rotary(layer), self.schedule, index, vllm_config)
        after_attention = family_of([type(self).__name__]).after_attention
        layers[-1].get_submodule(after_attention).register_forward_pre_hook(_cut_to_sampled_rows)
        self.small_ops = None
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            self.small_ops = SmallOps(self.model)
        self.layer_names = [module.layer_name for module in attention]
        install_in_worker()
        if self.schedule.prunes:
            add_prompt_pages(vllm_config, attention[0], self.schedule)

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
        hidden, residual = self.model.embed_input_ids(input_ids), None
        num_tokens = len(hidden)
        metadata = _stage_metadata()
        if self.small_ops:
            self.small_ops.recorded = metadata is not None and metadata.step.kind.is_recorded
        every_row = metadata is None or captures_pieces()
        if not every_row:
            rows = slice(0, metadata.step.num_rows(0))
            hidden, positions = hidden[rows], positions[rows]
        if metadata is not None:  # else vLLM's memory profile
            between_graphs(_begin)
        for stage in range(self.schedule.num_stages):
            if stage > 0 and metadata is not None:
                hidden, residual, positions = _cross(stage, hidden, residual, positions)
            for index in self.schedule.stage_layers(stage):
                hidden, residual = self.model.layers[index](positions, hidden, residual)
        hidden, _ = self.model.norm(hidden, residual)
        if every_row:
            return hidden
        return to_token_layout(hidden, metadata.step, metadata.boundary, num_tokens)


def _stage_metadata() -> StageMetadata | None:
    """That of the first layer; None: there are no requests."""
    metadata = get_forward_context().attn_metadata
    return next(iter(metadata.values())) if metadata else None


def _begin() -> None:
    metadata = _stage_metadata()
    metadata.boundary.begin(metadata.step)


def _cross(stage: int, hidden, residual, positions):
    """Over a boundary; where a graph is captured in pieces, nothing is dropped at its replays."""
    if captures_pieces():
        between_graphs(partial(_cross_without_drops, stage))
        return hidden, residual, positions
    metadata = _stage_metadata()
    step, boundary = metadata.step, metadata.boundary
    hidden, residual = boundary.cross(step, stage, hidden, residual)
    return hidden, residual, boundary.buffers.rows[stage].position[: step.num_rows(stage)]


def _cross_without_drops(stage: int) -> None:
    metadata = _stage_metadata()
    assert metadata.step.drops_nothing
    metadata.boundary.cross(metadata.step, stage, None, None)


def _cut_to_sampled_rows(module: torch.nn.Module, args: tuple) -> tuple | None:
    """After the last attention: ``(hidden, residual)`` of the rows that are sampled from."""
    metadata = _stage_metadata()
    if metadata is None or captures_pieces():
        return None
    rows = sampled_rows(metadata.step, metadata.boundary)
    return tuple(states[rows] for states in args)
