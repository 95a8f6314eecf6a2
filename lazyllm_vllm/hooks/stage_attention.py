"""The attention of one layer of a stage.

Prefill rows attend to the prefill rows of their own request through FlashAttention
(scaled-dot-product attention on the CPU): those at hand, or, where earlier ones ran before, all of
them out of the cache. Decode rows read the paged cache: through
FlashAttention where all of it is attended to, else through ``kernels.attention``. FlashAttention
counts a sliding window in rows, which are positions in stage 0 alone: behind it our kernels do. In
the layers that score, the log-denominators are kept for the boundary; layers with a window see too
little to score.
"""

import torch
import torch.nn.functional as F

from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.platforms import current_platform
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides
from vllm.v1.attention.backend import AttentionImpl
from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.kernels.attention import DecodeRows, paged_attention
from lazyllm_vllm.kernels.layer_form import LayerForm, attend
from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.rotary import rotate_and_write
from lazyllm_vllm.kernels.score import last_rows_lse
from lazyllm_vllm.kernels.window_attention import KeptRows, window_attention
from lazyllm_vllm.kernels.write_kv import write_kv
from lazyllm_vllm.plan.config import ConfigError
from lazyllm_vllm.runtime.step import Step


class StageAttention(AttentionImpl[StageMetadata]):
    """Attributes:
    form: scale, sliding window and sinks.
    rotary: the layer's rotary embedding, left to its attention; None: done before.
    scores_first: whether this is the first of the model's layers that score.
    is_fp8: whether keys and values are stored in FP8 (e4m3).
    graph_splits: programs that FlashAttention may share a decode's keys among in a CUDA graph.
    """

    kv_cache_dtype = "auto"

    def __init__(
        self,
        layer: Attention,
        rotary: RotaryEmbedding | None,
        vllm_config: VllmConfig,
        scores_first: bool,
    ) -> None:
        """``layer``: as its model built it."""
        self.num_heads = layer.num_heads
        self.num_kv_heads = layer.num_kv_heads
        self.head_size = layer.head_size
        sinks = getattr(layer.impl, "sinks", None)
        self.form = LayerForm(float(layer.impl.scale), layer.sliding_window, sinks)
        self.rotary = rotary
        self.scores_first = scores_first
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
    ) -> torch.Tensor:
        """Rotate, write the rows' keys and values, attend, and score.

        Args:
            query, output: ``[rows, heads, head_size]``.
            key, value: ``[rows, kv_heads, head_size]``.
            kv_cache: ``[blocks, kv_heads, block_size, 2 * head_size]``.
        """
        if attn_metadata is None:  # vLLM's memory profile
            return output.fill_(0)
        step, boundary, stage = attn_metadata.step, attn_metadata.boundary, attn_metadata.stage
        is_last_layer = attn_metadata.last_layer == layer.layer_name
        is_full = self.form.window is None
        prefills_score = is_full and boundary.scores_prefills(step, stage, is_last_layer)
        decodes_score = is_full and boundary.scores_decodes(step, stage, is_last_layer)
        keys = self._keys(layer, kv_cache, attn_metadata)
        rows = step.num_rows(stage)
        if len(query) > rows:  # padded for a CUDA graph
            query, key, value, output = (x[:rows] for x in (query, key, value, output))
        self._write(layer, query, key, value, keys, attn_metadata)
        if step.num_decodes:
            if query.is_cuda and self._attends_whole(step, stage):
                self._decode_whole(query, output, keys, attn_metadata, decodes_score)
            else:
                self._decode(query, output, keys, attn_metadata)
        if step.num_prefills:
            self._prefill(query, key, value, output, keys, attn_metadata, prefills_score)
        if prefills_score or decodes_score:
            boundary.score(
                step,
                query,
                keys,
                self.form.scale,
                prefills=prefills_score,
                decodes=decodes_score,
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

    def _write(self, layer, query, key, value, keys: StageKeys, metadata: StageMetadata) -> None:
        """Rotate queries and keys, if that is left to us, and write keys and values."""
        step, buffers, stage = metadata.step, metadata.boundary.buffers, metadata.stage
        mappings = buffers.slot_mappings if stage else step.batch.slot_mappings
        slots = mappings[metadata.group][: len(query)]
        if self.rotary is not None:
            cos_sin = self.rotary._match_cos_sin_cache_dtype(query)
            positions = _positions(metadata)
            rotate_and_write(query, key, value, cos_sin, positions, slots, keys)
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
        k, v = keys.kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
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
                window_size=self._window_size,
                num_splits=max_splits,
            )
        result = fa_utils.flash_attn_varlen_func(
            query[:n],
            canonicalize_singleton_dim_strides(k),
            canonicalize_singleton_dim_strides(v),
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=self.max_model_len,
            seqused_k=lengths,
            softmax_scale=self.form.scale,
            causal=True,
            window_size=self._window_size,
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

    def _prefill(
        self, query, key, value, output, keys: StageKeys, metadata: StageMetadata, scores: bool
    ) -> None:
        """Causal attention of each prompt's kept tokens; if they score, the log-denominators of
        its last rows, the last one first, go to ``buffers.lse``."""
        step, buffers, stage = metadata.step, metadata.boundary.buffers, metadata.stage
        segments, longest = step.segments[stage], step.longest_prefill[stage]
        if segments.base:
            query, key, value, output = (x[segments.base :] for x in (query, key, value, output))
        if step.continues(stage):
            self._prefill_on(query, output, keys, metadata, scores)
            return
        if self.form.window is not None and (stage > 0 or not query.is_cuda):
            positions = _positions(metadata)[segments.base :]
            rows = KeptRows(positions, segments.start, longest)
            window_attention(output, query, key, value, rows, self.form)
            return
        attend = self.prefill_flash if query.is_cuda else self.prefill_dense
        window_rows = step.window_rows(stage, len(buffers.lse)) if scores else None
        both = (longest, longest)
        start = segments.start
        lse = attend(query, key, value, output, start, both, window_rows, start)
        if scores:
            buffers.lse[:, step.first_prefill : step.num_requests] = lse

    def _prefill_on(
        self, query, output, keys: StageKeys, metadata: StageMetadata, scores: bool
    ) -> None:
        """The same where some of the keys are of rows that ran before, all in the cache."""
        step, buffers, stage = metadata.step, metadata.boundary.buffers, metadata.stage
        segments, mine = step.segments[stage], slice(step.first_prefill, step.num_requests)
        span, windowed = step.spans[stage], self.form.window is not None and stage > 0
        window_rows = step.window_rows(stage, len(buffers.lse)) if scores else None
        if query.is_cuda and not (self.is_fp8 or windowed):
            lse = self._prefill_paged(query, output, keys, step, window_rows)
        else:
            num_keys = int(span.end.sum())
            k, v, positions, starts = keys.gather_all(step.prefills, num_keys)
            k, v = k.to(query.dtype), v.to(query.dtype)
            if windowed:
                self._window_on(query, output, (k, v, positions, starts), step, stage)
                return
            attend = self.prefill_flash if query.is_cuda else self.prefill_dense
            longest = step.longest_prefill[stage], int(span.end.max())
            lse = attend(query, k, v, output, segments.start, longest, window_rows, starts)
        if scores:
            buffers.lse[:, mine] = lse

    def _prefill_paged(
        self, query, output, keys: StageKeys, step: Step, window_rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        stage, mine = keys.stage, slice(step.first_prefill, step.num_requests)
        k, v = keys.kv_cache.transpose(1, 2).split(self.head_size, dim=-1)
        result = fa_utils.flash_attn_varlen_func(
            query,
            canonicalize_singleton_dim_strides(k),
            canonicalize_singleton_dim_strides(v),
            max_seqlen_q=step.longest_prefill[stage],
            cu_seqlens_q=step.segments[stage].start,
            max_seqlen_k=int(step.spans[stage].end.max()),
            seqused_k=keys.length[mine],
            softmax_scale=self.form.scale,
            causal=True,
            window_size=self._window_size,
            s_aux=self.form.sinks,
            block_table=keys.block_table[mine],
            out=output,
            return_softmax_lse=window_rows is not None,
            fa_version=self.fa_version,
        )
        return None if window_rows is None else result[1].T[window_rows]

    def _window_on(self, query, output, gathered: tuple, step: Step, stage: int) -> None:
        """With a sliding window that counts positions. Rows that ran before run again, as zeros:
        few see many keys, so that this costs little."""
        k, v, positions, starts = gathered
        segments, span = step.segments[stage], step.spans[stage]
        at = torch.arange(len(query), device=query.device)
        nth = torch.arange(step.num_prefills, device=query.device)
        lengths = segments.start.diff().long()
        nth = nth.repeat_interleave(lengths, output_size=len(query))
        at = starts[nth] + segments.first[nth] + at - segments.start[nth]
        all_queries = query.new_zeros(len(k), *query.shape[1:])
        all_queries[at] = query
        result = torch.empty_like(all_queries)
        rows = KeptRows(positions, starts, int(span.end.max()))
        window_attention(result, all_queries, k, v, rows, self.form)
        output[:] = result[at]

    def prefill_flash(
        self,
        query,
        key,
        value,
        output,
        starts: torch.Tensor,
        longest: tuple[int, int],
        window_rows: torch.Tensor | None,
        key_starts: torch.Tensor,
    ) -> torch.Tensor | None:
        """Causal attention of each prompt's kept tokens; its last row sees all of its keys.

        Args:
            starts, key_starts: ``[prefills + 1]`` int32, first row of each, and first key.
            longest: most rows and most keys of a prefill.
            window_rows: ``[window, prefills]``, rows whose log-denominators are wanted.

        Returns:
            ``[window, prefills, heads]`` fp32; None if none are wanted.
        """
        result = fa_utils.flash_attn_varlen_func(
            query,
            key,
            value,
            max_seqlen_q=longest[0],
            cu_seqlens_q=starts,
            max_seqlen_k=longest[1],
            cu_seqlens_k=key_starts,
            softmax_scale=self.form.scale,
            causal=True,
            window_size=self._window_size,
            s_aux=self.form.sinks,
            out=output,
            return_softmax_lse=window_rows is not None,
            fa_version=self.fa_version,
        )
        return None if window_rows is None else result[1].T[window_rows]

    def prefill_dense(
        self, query, key, value, output, starts, longest, window_rows, key_starts
    ) -> torch.Tensor | None:
        """The same on the CPU."""
        bounds, key_bounds = starts.tolist(), key_starts.tolist()
        lse = []
        for mine, keys in zip(*(map(slice, b, b[1:]) for b in (bounds, key_bounds))):
            q, k, v = query[mine], key[keys], value[keys]
            at = torch.arange(len(k))
            seen = self.form.sees(at[len(k) - len(q) :], at)
            if self.form.sinks is not None:
                output[mine] = attend(q, k, v, seen, self.form)[0]
            elif len(q):
                heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
                output[mine] = F.scaled_dot_product_attention(
                    *heads_first, attn_mask=seen, scale=self.form.scale, enable_gqa=True
                )[0].transpose(0, 1)
            if window_rows is not None:
                window = len(window_rows)
                lse.append(last_rows_lse(q, k, self.form.scale, window, self.form.sinks))
        return torch.stack(lse, dim=1) if lse else None

    @property
    def _window_size(self) -> list[int]:
        """The sliding window as FlashAttention takes it: tokens before and after a row's own."""
        return [-1, -1] if self.form.window is None else [self.form.window - 1, 0]


def _positions(metadata: StageMetadata) -> torch.Tensor:
    """Of the stage's rows, ``[rows or more]`` int64."""
    step, stage = metadata.step, metadata.stage
    return step.rows[stage].position if stage else step.batch.positions
