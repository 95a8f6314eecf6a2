"""The attention backend of the staged model: vLLM's interface, thin.

Prefill rows attend to the prefill rows of their own request, which are all at hand, through
FlashAttention (scaled-dot-product attention on the CPU). Decode rows read the paged cache: through
FlashAttention where all of it is attended to, else through ``kernels.attention``. At the last layer
of a stage the current tokens' scores are taken.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadataBuilder,
)
from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.checks import check_attention
from lazyllm_vllm.config import ConfigError
from lazyllm_vllm.cuda_graphs import between_graphs
from lazyllm_vllm.kernels.attention import paged_attention
from lazyllm_vllm.kernels.rotary import rotate_and_write
from lazyllm_vllm.kernels.rows import write_kv
from lazyllm_vllm.kernels.score import last_rows_lse, score_tokens
from lazyllm_vllm.kv_cache.specs import StageSpec
from lazyllm_vllm.schedule import Schedule
from lazyllm_vllm.step import Step


@dataclass
class StageMetadata:
    """What the layers of one KV cache group are told in a step.

    Attributes:
        group: the KV cache group, which has its own block table and slots.
        last_layer: name of the stage's last layer, before the boundary; None in the last stage.
    """

    step: Step
    stage: int
    group: int
    last_layer: str | None


class LazyAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["LazyAttentionImpl"]:
        return LazyAttentionImpl

    @staticmethod
    def get_builder_cls() -> type["LazyMetadataBuilder"]:
        return LazyMetadataBuilder


class LazyMetadataBuilder(AttentionMetadataBuilder[StageMetadata]):
    """Says that decode batches run in full CUDA graphs; the metadata itself is built for all
    groups at once by ``LazyModelState.prepare_attn``."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False) -> StageMetadata:
        raise NotImplementedError("LazyModelState.prepare_attn builds the metadata")


class LazyAttentionImpl(AttentionImpl[StageMetadata]):
    """Attributes:
    rotary: the layer's rotary embedding, left to its attention; None: done before.
    peak: whether scores are peaks over all layers so far, or means in a stage's last layer.
    is_first: whether this is the model's first layer.
    """

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int, max_model_len: int,
        rotary: RotaryEmbedding | None, peak: bool, is_first: bool,
    ) -> None:  # fmt: skip
        self.rotary = rotary
        self.peak = peak
        self.is_first = is_first
        self.max_model_len = max_model_len
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = "auto"
        self.fa_version = fa_utils.get_flash_attn_version(head_size=head_size)
        if current_platform.is_cuda() and self.fa_version is None:
            raise ConfigError(
                "lazyllm: LazyLLM needs FlashAttention, which this GPU or head size "
                f"({head_size}) does not have"
            )

    def forward(
        self,
        layer: "StagedAttention",
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StageMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rotate, write the rows' keys and values, attend, and score.

        Args:
            query, output: ``[rows, heads, head_size]``.
            key, value: ``[rows, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        """
        if attn_metadata is None:  # vLLM's memory profile
            return output.fill_(0)
        step, stage, group = attn_metadata.step, attn_metadata.stage, attn_metadata.group
        step.enter(stage)
        num_rows = step.num_rows(stage)
        num_decode_rows = num_rows - step.num_prefill_rows(stage)
        at_boundary = attn_metadata.last_layer == layer.layer_name
        decodes_score = step.decodes_select and at_boundary
        prefills_score = step.prefills_select and (
            at_boundary or (self.peak and attn_metadata.last_layer is not None)
        )
        slots = step.slot_mapping(group)[:num_rows]
        key, value = key[:num_rows], value[:num_rows]
        if self.rotary is None:
            write_kv(layer, kv_cache, key, value, slots)
        else:
            cos_sin = self.rotary._match_cos_sin_cache_dtype(query)
            positions = step.row_position(stage)
            rotate_and_write(query[:num_rows], key, value, cos_sin, positions, slots, kv_cache)
        if step.num_decodes:
            if query.is_cuda and (stage == 0 or not step.decodes_select):
                self._decode_whole(query, kv_cache, output, step, stage, group, decodes_score)
            else:
                self._decode(query, kv_cache, output, step, stage, group, num_decode_rows)
        if num_decode_rows < num_rows:
            prefill = slice(num_decode_rows, num_rows)
            lse = self._prefill(
                query[prefill], key[prefill], value[prefill], output[prefill], step, stage,
                prefills_score,
            )  # fmt: skip
            if prefills_score:
                buffers = step.buffers
                buffers.lse[:, step.num_decodes : step.num_requests] = lse
                self._score(
                    query, kv_cache, step, stage, group, step.num_decodes, step.num_prefills,
                    buffers.lse, buffers.is_pruned, self.peak and not self.is_first,
                )  # fmt: skip
        if step.num_decodes and decodes_score:
            buffers = step.buffers
            self._score(
                query, kv_cache, step, stage, group, 0, step.num_decodes, buffers.lse[:1],
                buffers.active[stage + 1], False,
            )  # fmt: skip
        return output

    def _score(
        self, query, kv_cache, step, stage, group, first, count, lse, active, accumulates
    ) -> None:
        buffers = step.buffers
        score_tokens(
            buffers.token_score, query, step.query_row(stage), lse, kv_cache,
            step.block_tables[group], step.position_table, step.key_len(stage),
            buffers.num_prompt, active, buffers.slot_position, first, count, self.scale, stage,
            self.peak, accumulates,
        )  # fmt: skip

    def _decode_whole(self, query, kv_cache, output, step, stage, group, scores) -> None:
        """Decodes that attend to every key of theirs in the stage, where nothing is revived: what
        stock vLLM does, with FlashAttention and as many keys as the stage has."""
        n = step.num_decodes
        key_len = step.key_len(stage)[:n]
        starts = step.buffers.decode_starts[: n + 1]
        keys, values = kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        if stage not in step.decode_schedules and self.fa_version == 3:
            step.decode_schedules[stage] = fa_utils.get_scheduler_metadata(
                batch_size=n,
                max_seqlen_q=1,
                max_seqlen_k=self.max_model_len,
                num_heads_q=self.num_heads,
                num_heads_kv=self.num_kv_heads,
                headdim=self.head_size,
                cache_seqlens=key_len,
                qkv_dtype=kv_cache.dtype,
                cu_seqlens_q=starts,
                page_size=kv_cache.shape[2],
                causal=True,
                num_splits=step.max_splits,
            )
        result = fa_utils.flash_attn_varlen_func(
            query[:n],
            canonicalize_singleton_dim_strides(keys),
            canonicalize_singleton_dim_strides(values),
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=self.max_model_len,
            seqused_k=key_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=step.block_tables[group][:n],
            out=output[:n],
            return_softmax_lse=scores,
            scheduler_metadata=step.decode_schedules.get(stage),
            num_splits=step.max_splits if self.fa_version == 3 else 0,
            fa_version=self.fa_version,
        )
        if scores:
            step.buffers.lse[0, :n] = result[1].T

    def _decode(self, query, kv_cache, output, step, stage, group, num_rows) -> None:
        buffers = step.buffers
        paged_attention(
            output[:num_rows], buffers.lse[0], query[:num_rows], kv_cache,
            step.block_tables[group], step.position_table,
            step.key_len(stage), buffers.rows[stage].num_revived, buffers.share,
            step.row_position(stage), buffers.slot_position, buffers.selected, buffers.num_prompt,
            step.num_decodes, step.max_revived if stage else 0, self.scale, stage,
            step.strict,
        )  # fmt: skip

    def _prefill(self, query, key, value, output, step, stage, scores) -> torch.Tensor | None:
        """Causal attention of each prompt's kept tokens; if asked for, the log-denominators of
        its last rows, the last one first: ``[score_window, prefills, heads]`` fp32."""
        starts = step.prefill_starts[stage]
        window = step.schedule.config.score_window
        if query.is_cuda:
            result = fa_utils.flash_attn_varlen_func(
                query,
                key,
                value,
                max_seqlen_q=step.max_prefill_rows[stage],
                cu_seqlens_q=starts,
                max_seqlen_k=step.max_prefill_rows[stage],
                cu_seqlens_k=starts,
                softmax_scale=self.scale,
                causal=True,
                out=output,
                return_softmax_lse=scores,
                fa_version=self.fa_version,
            )
            if not scores:
                return None
            back = torch.arange(1, window + 1, device=starts.device)
            rows = (starts[1:] - back[:, None]).clamp(min=0)  # shorter prompts are not scored
            return result[1].T[rows]
        bounds = starts.tolist()
        for start, end in zip(bounds, bounds[1:]):
            q, k, v = (x[start:end].transpose(0, 1)[None] for x in (query, key, value))
            output[start:end] = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=self.scale, enable_gqa=True
            )[0].transpose(0, 1)
        if not scores:
            return None
        return torch.stack(
            [
                last_rows_lse(query[start:end], key[start:end], self.scale, window)
                for start, end in zip(bounds, bounds[1:])
            ],
            dim=1,
        )


class StagedAttention(Attention):
    """vLLM's attention layer, told its stage."""

    schedule: Schedule
    stage: int

    @classmethod
    def adopt(
        cls,
        layer: Attention,
        rotary: RotaryEmbedding | None,
        schedule: Schedule,
        index: int,
        max_model_len: int,
    ) -> None:
        """Turn a decoder layer's attention, as its model built it, into one of a stage.

        Models build ``Attention`` themselves and the backend they get is the platform's to choose,
        so the class is changed after the fact: no copy of any model's code is needed.
        """
        check_attention(layer)
        layer.__class__ = cls
        layer.schedule = schedule
        layer.stage = schedule.stage_of(index)
        layer.attn_backend = LazyAttentionBackend
        layer.impl = LazyAttentionImpl(
            layer.num_heads, layer.head_size, layer.impl.scale, layer.num_kv_heads, max_model_len,
            rotary, peak=schedule.config.score == "peak", is_first=index == 0,
        )  # fmt: skip

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attend; ``query``, ``key``, ``value`` and the result are ``[rows, heads * head_size]``.

        Not by way of vLLM's custom op, which hides attention from torch.compile: nothing compiles
        the staged model, and the op's detour costs time in every layer.
        """
        output = query.new_empty(query.shape)
        between_graphs(self._attend, query, key, value, output)
        return output

    def _attend(self, query, key, value, output) -> None:
        metadata = get_forward_context().attn_metadata
        self.impl.forward(
            self,
            query.view(-1, self.num_heads, self.head_size),
            key.view(-1, self.num_kv_heads, self.head_size),
            value.view(-1, self.num_kv_heads, self.head_size),
            self.kv_cache,
            metadata and metadata[self.layer_name],
            output=output.view(-1, self.num_heads, self.head_size),
        )

    def get_kv_cache_spec(self, vllm_config) -> StageSpec:
        return StageSpec(
            # vLLM may change the block size after the model is built.
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=self.num_kv_heads,
            head_size=self.head_size,
            dtype=self.kv_cache_torch_dtype,
            stage=self.stage,
            schedule=self.schedule,
        )
