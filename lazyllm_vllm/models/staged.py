"""The staged forward: any decoder whose layers are ``layer(positions, hidden, residual)``."""

import torch

from vllm.config import VllmConfig
from vllm.config.compilation import CUDAGraphMode
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from lazyllm_vllm.attention import StagedAttention
from lazyllm_vllm.aux_cache import add_aux_pages
from lazyllm_vllm.cuda_graphs import between_graphs, captures_pieces
from lazyllm_vllm.models.rotary import take_rotary
from lazyllm_vllm.models.small_ops import SmallOps
from lazyllm_vllm.patches import install_in_worker
from lazyllm_vllm.schedule import Schedule
from lazyllm_vllm.step import Step


class StagedDecoder:
    """Mix-in for a vLLM causal language model with ``self.model.embed_input_ids``,
    ``self.model.layers``, each of which ends with its ``mlp``, and ``self.model.norm``.

    Call ``cut_into_stages`` at the end of ``__init__`` and put the mix-in before the model's class.
    """

    def cut_into_stages(self, vllm_config: VllmConfig) -> None:
        """Give every decoder layer its stage, and the Aux Cache its place."""
        layers = self.model.layers
        self.schedule = Schedule.of(vllm_config)
        attention = [
            next(m for m in layer.modules() if isinstance(m, Attention)) for layer in layers
        ]
        max_len = vllm_config.model_config.max_model_len
        for index, (layer, module) in enumerate(zip(layers, attention)):
            rotary = take_rotary(layer)
            StagedAttention.adopt(module, rotary, self.schedule, index, max_len)
        # After the last attention only the rows that are sampled from matter.
        layers[-1].mlp.register_forward_pre_hook(_take_current_rows)
        self.small_ops = None
        if vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE:
            self.small_ops = SmallOps(self.model)
        self.layer_names = [module.layer_name for module in attention]
        install_in_worker()
        if self.schedule.has_aux:
            add_aux_pages(vllm_config, attention[0], self.schedule)

    @staticmethod
    def get_model_state_cls():
        from lazyllm_vllm.model_state import LazyModelState

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
        hidden = self.model.embed_input_ids(input_ids)
        step = _current_step()
        if self.small_ops:
            self.small_ops.recorded = step is not None and step.recorded
        if captures_pieces():
            between_graphs(_begin, positions)
            return self._run_whole(hidden, positions)
        if step is None:  # vLLM's memory profile: every token through every layer
            return self._run_whole(hidden, positions)

        num_tokens = hidden.shape[0]
        hidden, positions = hidden[: step.num_rows(0)], positions[: step.num_rows(0)]
        step.begin(positions)
        residual = None
        for stage in range(self.schedule.num_stages):
            if stage > 0:
                hidden, residual, positions = step.cross(stage, hidden, residual)
            for index in self.schedule.stage_layers(stage):
                hidden, residual = self.model.layers[index](positions, hidden, residual)
        hidden, _ = self.model.norm(hidden, residual[step.current_rows()])
        if step.num_prefills == 0 and step.num_decodes == num_tokens:
            return hidden
        out = hidden.new_empty(num_tokens, hidden.shape[1])
        out[step.sampled_tokens] = hidden
        return out

    def _run_whole(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Every row through every layer."""
        residual = None
        for layer in self.model.layers:
            hidden, residual = layer(positions, hidden, residual)
        return self.model.norm(hidden, residual)[0]


def _begin(positions: torch.Tensor) -> None:
    step = _current_step()
    step.begin(positions[: step.num_rows(0)])


def _take_current_rows(module: torch.nn.Module, args: tuple) -> tuple | None:
    step = _current_step()
    if step is None or captures_pieces():
        return None
    return (args[0][step.current_rows()], *args[1:])


def _current_step() -> Step | None:
    metadata = get_forward_context().attn_metadata
    if metadata is None:
        return None
    return next(iter(metadata.values())).step
