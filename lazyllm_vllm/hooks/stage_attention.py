"""The attention of one layer of a stage.

Prefill rows attend as ``prefill_attention`` says. Decode rows read the paged cache: through
FlashAttention where all of it is attended to, else through ``kernels.attention``. In the layers
that score, the log-denominators are kept for the boundary; layers with a window see too little to
score.
"""

import torch

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.hooks.prefill_attention import MOST_COPIED, PrefillAttention
from lazyllm_vllm.kernels.attention import DecodeRows, paged_attention
from lazyllm_vllm.kernels.layer_form import LayerForm
from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.rotary import rotate_and_write
from lazyllm_vllm.kernels.write_kv import write_kv
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.runtime.step import Step


class StageAttention(AttentionImpl[StageMetadata]):
    """Attributes:
    form: scale, sliding window and sinks.
    rotary: the layer's rotary embedding, left to its attention; None: done before.
    scores_first: whether this is the first of the model's layers that score.
    scores_behind: whether this is one of ``Schedule.scoring_behind``.
    is_fp8: whether keys and values are stored in FP8 (e4m3).
    graph_splits: programs that FlashAttention may share a decode's keys among in a CUDA graph.
    prefill: the attention of prefill rows; most_copied: bytes that it takes at once.
    """

    kv_cache_dtype = "auto"

    def __init__(
        self,
        layer: Attention,
        rotary: RotaryEmbedding | None,
        vllm_config: VllmConfig,
        scores_first: bool,
        scores_behind: bool,
    ) -> None:
        """``layer``: as its model built it."""
        self.num_heads = layer.num_heads
        self.num_kv_heads = layer.num_kv_heads
        self.head_size = layer.head_size
        sinks = getattr(layer.impl, "sinks", None)
        self.form = LayerForm(float(layer.impl.scale), layer.sliding_window, sinks)
        self.rotary = rotary
        self.scores_first = scores_first
        self.scores_behind = scores_behind
        self.is_fp8 = layer.kv_cache_dtype.startswith("fp8")
        self.max_model_len = vllm_config.model_config.max_model_len
        config = vllm_config.attention_config
        self.graph_splits = config.flash_attn_max_num_splits_for_cuda_graph
        self.fa_version = fa_utils.get_flash_attn_version(head_size=self.head_size)
        if current_platform.is_cuda() and self.fa_version is None:
            raise ConfigError(
                "lazyllm: LazyLLM needs FlashAttention, which this GPU or head size "
                f"({self.head_size}) does not have"
            )
        if current_platform.is_cuda() and sinks is not None and self.fa_version == 2:
            raise ConfigError(
                "lazyllm: this model has attention sinks, which need FlashAttention 3 (Hopper)"
            )

        self.prefill = PrefillAttention(self.form, self.fa_version, self.max_model_len)
        per_token = 2 * self.num_kv_heads * self.head_size * vllm_config.model_config.dtype.itemsize
        self.most_copied = min(MOST_COPIED, self.max_model_len * per_token)

    def forward(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StageMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
        writes: bool = True,
    ) -> torch.Tensor:
        """Rotate, write the rows' keys and values, attend, and score.

        Args:
            query, output: ``[rows, heads, head_size]``.
            key, value: ``[rows, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
            writes: False: rows are rotated and written; see ``write_in_piece``.
        """
        if attn_metadata is None:  # vLLM's memory profile
            output.new_empty(self.most_copied, dtype=torch.uint8)
            return output.fill_(0)
        step, boundary, stage = attn_metadata.step, attn_metadata.boundary, attn_metadata.stage
        is_last_layer = attn_metadata.last_layer == layer.layer_name
        is_full = self.form.window is None
        prefills_score = is_full and boundary.scores_prefills(step, stage, is_last_layer)
        decodes = range(0)
        if is_full and step.num_decodes:
            decodes = boundary.scoring_decodes(step, stage, is_last_layer, self.scores_behind)
        keys = self._keys(layer, kv_cache, attn_metadata)
        rows = step.num_rows(stage)
        if len(query) > rows:  # padded for a CUDA graph
            query, key, value, output = (x[:rows] for x in (query, key, value, output))
        if writes:
            self._write(layer, query, key, value, keys, attn_metadata)
        decodes_whole = query.is_cuda and step.num_decodes and self._attends_whole(step, stage)
        if decodes_whole and self.prefill.reads_pages(query, keys, step):
            scores = prefills_score, bool(decodes)
            self.prefill.run_with_decodes(query, output, keys, attn_metadata, *scores)
        else:
            if decodes_whole:
                self._decode_whole(query, output, keys, attn_metadata, bool(decodes))
            elif step.num_decodes:
                self._decode(query, output, keys, attn_metadata)
            if step.num_prefills:
                self.prefill.run(query, key, value, output, keys, attn_metadata, prefills_score)
        if prefills_score or decodes:
            boundary.score(
                step,
                query,
                keys,
                self.form.scale,
                prefills=prefills_score,
                decodes=decodes,
                is_first_layer=self.scores_first,
            )
        return output

    def _keys(self, layer, kv_cache, metadata: StageMetadata) -> StageKeys:
        scales = (layer._k_scale_float, layer._v_scale_float) if self.is_fp8 else (1.0, 1.0)
        return metadata.boundary.keys_of(
            layer.layer_name, kv_cache, metadata.stage, metadata.group, scales
        )

    def _attends_whole(self, step: Step, stage: int) -> bool:
        """Whether FlashAttention can do a step's decodes."""
        if self.is_fp8:  # it would want queries in FP8 too
            return False
        return stage == 0 or (self.form.window is None and not step.decodes_select)

    def write_in_piece(
        self,
        layer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: StageMetadata,
    ) -> None:
        """Rotate and write as ``forward`` does, in a piece of a CUDA graph: a launch for each layer
        that the CPU is spared."""
        rows = attn_metadata.boundary.buffers.piece_rows
        keys, slots = self._keys(layer, kv_cache, attn_metadata), rows.slots[attn_metadata.group]
        self._rotate_and_write(query, key, value, rows.positions, slots, keys)

    def _rotate_and_write(self, query, key, value, positions, slots, keys: StageKeys) -> None:
        cos_sin = self.rotary._match_cos_sin_cache_dtype(query)
        rotate_and_write(query, key, value, cos_sin, positions, slots, keys)

    def _write(self, layer, query, key, value, keys: StageKeys, metadata: StageMetadata) -> None:
        """Rotate queries and keys, if that is left to us, and write keys and values."""
        step, stage = metadata.step, metadata.stage
        slots = step.slot_mappings(stage)[metadata.group][: len(query)]
        if self.rotary is not None:
            self._rotate_and_write(query, key, value, step.positions(stage), slots, keys)
        elif query.is_cuda:
            stored = keys.kv_cache.view(torch.uint8) if self.is_fp8 else keys.kv_cache
            key_cache, value_cache = stored.transpose(1, 2).chunk(2, dim=-1)
            dtype, scales = layer.kv_cache_dtype, (layer._k_scale, layer._v_scale)
            fa_utils.reshape_and_cache_flash(
                key, value, key_cache, value_cache, slots, dtype, *scales
            )
        else:
            write_kv(key, value, slots, keys)

    def _decode_whole(self, query, output, keys: StageKeys, metadata, scores: bool) -> None:
        """Decodes that attend to every key of theirs in the stage, where nothing is revived: what
        stock vLLM does, with FlashAttention and as many keys as the stage has."""
        step, buffers, n = metadata.step, metadata.boundary.buffers, metadata.step.num_decodes
        max_splits = self.graph_splits if step.kind.is_in_full_graph else 0
        lengths = keys.length[:n]
        starts = buffers.decode_starts[: n + 1]
        k, v = keys.for_flash
        schedules, like = step.decode_schedules, (keys.stage, self.form.window)
        if like not in schedules and self.fa_version == 3:
            schedules[like] = fa_utils.get_scheduler_metadata(
                batch_size=n,
                max_seqlen_q=1,
                max_seqlen_k=self.max_model_len,
                num_heads_q=self.num_heads,
                num_heads_kv=self.num_kv_heads,
                headdim=self.head_size,
                cache_seqlens=lengths,
                qkv_dtype=k.dtype,
                cu_seqlens_q=starts,
                page_size=keys.block_size,
                causal=True,
                window_size=self.form.flash_window,
                num_splits=max_splits,
            )
        result = fa_utils.flash_attn_varlen_func(
            query[:n],
            k,
            v,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=self.max_model_len,
            seqused_k=lengths,
            softmax_scale=self.form.scale,
            causal=True,
            window_size=self.form.flash_window,
            s_aux=self.form.sinks,
            block_table=keys.block_table[:n],
            out=output[:n],
            return_softmax_lse=scores,
            scheduler_metadata=schedules.get(like),
            num_splits=max_splits if self.fa_version == 3 else 0,
            fa_version=self.fa_version,
        )
        if scores:
            buffers.lse[0, :n] = result[1].T

    def _decode(self, query, output, keys: StageKeys, metadata: StageMetadata) -> None:
        """Decodes whose revived rows attend beside them, or that attend to a selection."""
        step, boundary = metadata.step, metadata.boundary
        buffers = boundary.buffers
        rows = slice(0, step.num_decode_rows(keys.stage))
        decodes = DecodeRows(
            step.rows[keys.stage],
            step.num_decodes,
            step.max_revived if keys.stage else 0,
            boundary.strict,
        )
        paged_attention(
            output[rows], buffers.lse[0], query[rows], keys, decodes, self.form, buffers.selection
        )
