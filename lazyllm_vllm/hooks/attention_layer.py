"""vLLM's attention layer, told its stage."""

from dataclasses import replace
from functools import partial

import torch

from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import get_dtype_size

from lazyllm_vllm.hooks.attention_backend import LazyAttentionBackend, StageMetadata
from lazyllm_vllm.hooks.cuda_graphs import between_graphs, captures_pieces
from lazyllm_vllm.hooks.engine_config import full_layers, parked_width
from lazyllm_vllm.hooks.kv_cache.specs import SharedStageSpec, StageSpec
from lazyllm_vllm.hooks.refusals import check_attention
from lazyllm_vllm.hooks.stage_attention import StageAttention
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.schedule import Schedule


class StagedAttention(Attention):
    schedule: Schedule
    stage: int

    @classmethod
    def adopt(
        cls,
        layer: Attention,
        rotary: RotaryEmbedding | None,
        schedule: Schedule,
        index: int,
        vllm_config: VllmConfig,
    ) -> None:
        """Turn a decoder layer's attention, as its model built it, into one of a stage.

        Models build ``Attention`` themselves and the backend they get is the platform's to choose,
        so the class is changed after the fact: no copy of any model's code is needed.

        Args:
            index: of the decoder layer, from 0.
        """
        full = full_layers(vllm_config.model_config)
        is_full = full is None or index + 1 in full
        check_attention(layer, is_full)
        scores_first = index == (full[0] - 1 if full else 0)
        scores_behind = index in schedule.scoring_behind(full)
        layer.impl = StageAttention(layer, rotary, vllm_config, scores_first, scores_behind)
        layer.__class__ = cls
        layer.schedule = schedule
        layer.stage = schedule.stage_of(index)
        layer.attn_backend = LazyAttentionBackend

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend; ``query``, ``key``, ``value`` and the result are ``[rows, heads * head_size]``.

        Not by way of vLLM's custom op, which hides attention from torch.compile: nothing compiles
        the staged model, and the op's detour costs time in every layer.
        """
        output = query.new_empty(query.shape)
        in_piece = captures_pieces() and self.impl.rotary is not None
        if in_piece:
            rows = self._heads(query, key, value)
            self.impl.write_in_piece(self, *rows, self.kv_cache, self._metadata())
        between_graphs(partial(self._attend, not in_piece), query, key, value, output)
        return output

    def _attend(self, writes: bool, query, key, value, output) -> None:
        self.impl.forward(
            self,
            *self._heads(query, key, value),
            self.kv_cache,
            self._metadata(),
            output=output.view(-1, self.num_heads, self.head_size),
            writes=writes,
        )

    def _heads(self, query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
        )

    def _metadata(self) -> StageMetadata | None:
        metadata = get_forward_context().attn_metadata
        return metadata and metadata[self.layer_name]

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> StageSpec:
        is_shared = self.stage == 0 or not self.schedule.prunes
        spec = (SharedStageSpec if is_shared else StageSpec)(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            stage=self.stage,
            needs=None,
        )
        # Hidden states are stored like keys: in the model's dtype, or in FP8.
        vector_size = parked_width(vllm_config) * get_dtype_size(spec.dtype)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        sizes = spec.block_size, spec.page_size_bytes, vector_size
        return replace(spec, needs=BlockNeeds(self.schedule, *sizes, ranks))
