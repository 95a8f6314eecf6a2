"""The attention of a stage's prefill rows, in one layer.

Each prompt's rows attend to its own kept tokens through FlashAttention (scaled-dot-product
attention on the CPU): to the rows at hand, or, where earlier ones ran before, to all of them out of
the cache. FlashAttention counts a sliding window in rows, which are positions in stage 0 alone:
behind it our kernel does.
"""

from typing import Any

import torch
import torch.nn.functional as F

from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.hooks.attention_backend import StageMetadata
from lazyllm_vllm.kernels.gather_keys import gather_keys
from lazyllm_vllm.kernels.layer_form import LayerForm, attend
from lazyllm_vllm.kernels.paged import FP8, StageKeys
from lazyllm_vllm.kernels.queries import last_rows_lse
from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.kernels.window_attention import KeptRows, window_attention
from lazyllm_vllm.runtime.step import Step
from lazyllm_vllm.runtime.step_kind import StepKind

# Bytes of keys and values that are copied at once. Less than a decoder's widest activations, which
# are not there meanwhile; vLLM's memory profile has it.
MOST_COPIED = 256 << 20
# Copied where so many rows or more attend to a key, on average. On an H100 FlashAttention does 695
# TFLOP/s with them side by side and 580 through blocks of 16; the copy pays from some 900 rows on.
LEAST_ROWS = 1024
# Programs that share a row's keys in a turn's CUDA graph, at most: each has a result of its own.
TURN_SPLITS = 8


class PrefillAttention:
    """Args:
    form: scale, sliding window and sinks.
    fa_version: FlashAttention's; None on a CPU.
    max_model_len: most keys that a decode may have.
    """

    def __init__(self, form: LayerForm, fa_version: int | None, max_model_len: int) -> None:
        self.form = form
        self.fa_version = fa_version
        self.max_model_len = max_model_len

    def run(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        output: torch.Tensor,
        keys: StageKeys,
        metadata: StageMetadata,
        scores: bool,
    ) -> None:
        """Causal attention of each prompt's kept tokens; if they score, the log-denominators of
        its last rows, the last one first, go to ``buffers.lse``.

        Args:
            query, output: ``[rows, heads, head_size]``; output is written.
            key, value: ``[rows, kv_heads, head_size]``, of the same rows.
            keys: where they have been written, too.
        """
        step, buffers, stage = metadata.step, metadata.boundary.buffers, metadata.stage
        segments, longest = step.segments[stage], step.longest_prefill[stage]
        mine = slice(step.first_prefill, step.num_requests)
        if segments.base:
            query, key, value, output = (x[segments.base :] for x in (query, key, value, output))
        window_rows = step.window_rows(stage, len(buffers.lse)) if scores else None
        if step.kind is StepKind.WARM_UP:
            self._run_on(query, output, keys, step, window_rows)
            if query.is_cuda and keys.kv_cache.dtype != FP8:
                self._paged(query, output, keys, step, window_rows)
        if step.continues(stage):
            lse = self._run_on(query, output, keys, step, window_rows)
        elif self.form.window is not None and (stage > 0 or not query.is_cuda):
            rows = KeptRows(step.positions(stage)[segments.base :], segments.start, longest)
            window_attention(output, query, key, value, rows, self.form)
            return
        else:
            start, both = segments.start, (longest, longest)
            lse = self.attend(query, key, value, output, start, both, window_rows, start)
        if scores:
            buffers.lse[:, mine] = lse

    def _run_on(
        self, query, output, keys: StageKeys, step: Step, window_rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        """The same where some of the keys are of rows that ran before, all in the cache."""
        stage = keys.stage
        if self.form.window is not None and stage > 0:
            self._window_on(query, output, keys, step)
            return None
        if self.reads_pages(query, keys, step):
            return self._paged(query, output, keys, step, window_rows)
        lse, at_once = [], max(MOST_COPIED // _bytes_of_head(query, keys, step), 1)
        group = query.shape[1] // keys.num_heads
        for first in range(0, keys.num_heads, at_once):
            heads = range(first, min(first + at_once, keys.num_heads))
            k, v, _ = self._gather(keys, step, query.dtype, heads)
            own = slice(heads.start * group, heads.stop * group)
            longest = step.longest_prefill[stage], step.longest_keys[stage]
            starts = step.segments[stage].start, longest, window_rows, step.key_starts[stage]
            lse.append(self.attend(query[:, own], k, v, output[:, own], *starts, heads=own))
        return None if window_rows is None else torch.cat(lse, -1)

    def reads_pages(self, query: torch.Tensor, keys: StageKeys, step: Step) -> bool:
        """Whether FlashAttention takes all keys of a step's prefills out of the cache."""
        stage, is_windowed = keys.stage, self.form.window is not None
        if not query.is_cuda or keys.kv_cache.dtype == FP8 or (is_windowed and stage > 0):
            return False
        if not (step.num_prefills and step.continues(stage)):
            return False
        if _bytes_of_head(query, keys, step) > MOST_COPIED:
            return True
        pays = step.num_pairs[stage] >= LEAST_ROWS * step.num_keys[stage] and not is_windowed
        return not (pays or step.kind is StepKind.WARM_UP)

    def run_with_decodes(
        self,
        query,
        output,
        keys: StageKeys,
        metadata: StageMetadata,
        scores: bool,
        decodes_score: bool,
    ) -> None:
        """What ``run`` does where ``reads_pages``, and decodes that attend to every key of theirs,
        in one launch. If they score, their log-denominators go to ``buffers.lse[0]``."""
        step, stage, lse = metadata.step, metadata.stage, metadata.boundary.buffers.lse
        all_requests, n = slice(0, step.num_requests), step.num_decodes
        longest = step.longest_request[stage], self.max_model_len
        places = all_requests, step.row_starts[stage], longest
        of_rows = self._flash_paged(query, output, keys, step, places, scores or decodes_score)
        if decodes_score:
            lse[0, :n] = of_rows[:n]
        if scores:
            window_rows = step.window_rows(stage, len(lse))
            lse[:, n : step.num_requests] = of_rows[n:][window_rows]

    def _gather(self, keys: StageKeys, step: Step, dtype: torch.dtype, heads: range | None = None):
        num_keys, longest = step.num_keys[keys.stage], step.longest_keys[keys.stage]
        starts = step.key_starts[keys.stage]
        return gather_keys(keys, step.prefills, starts, num_keys, longest, dtype, heads)

    def _paged(
        self, query, output, keys: StageKeys, step: Step, window_rows: torch.Tensor | None
    ) -> torch.Tensor | None:
        stage, mine = keys.stage, slice(step.first_prefill, step.num_requests)
        longest = step.longest_prefill[stage], step.longest_keys[stage]
        places = mine, step.segments[stage].start, longest
        lse = self._flash_paged(query, output, keys, step, places, window_rows is not None)
        return None if lse is None else lse[window_rows]

    def _flash_paged(
        self,
        query,
        output,
        keys: StageKeys,
        step: Step,
        places: tuple[slice, torch.Tensor, tuple[int, int]],
        wants_lse: bool,
    ) -> torch.Tensor | None:
        requests, *starts_and_longest = places
        paged: dict[str, Any] = {
            "seqused_k": keys.length[requests],
            "block_table": keys.block_table[requests],
        }
        if step.kind is StepKind.CAPTURE_TURN and self.fa_version == 3:
            paged["num_splits"] = TURN_SPLITS  # it goes by the keys that there are at a replay
        tensors = query, *keys.for_flash, output
        return self._flash(*tensors, *starts_and_longest, wants_lse, **paged)

    def _window_on(self, query, output, keys: StageKeys, step: Step) -> None:
        """With a sliding window that counts positions. Rows that ran before run again, as zeros:
        few see many keys, so that this costs little."""
        k, v, positions = self._gather(keys, step, query.dtype)
        segments, starts = step.segments[keys.stage], step.key_starts[keys.stage]
        if step.is_shifted:  # what was revived lies among what was decoded
            prefill = torch.arange(len(starts) - 1, device=k.device)
            prefill = prefill.repeat_interleave(starts.diff().long(), output_size=len(k))
            order = torch.argsort(prefill * 2**32 + positions)
            k, v, positions = k[order], v[order], positions[order]
        at = _keys_of_rows(segments, starts, step.num_prefills, len(query))
        all_queries = query.new_zeros(len(k), *query.shape[1:])
        all_queries[at] = query
        result = torch.empty_like(all_queries)
        rows = KeptRows(positions, starts, step.longest_keys[keys.stage])
        window_attention(result, all_queries, k, v, rows, self.form)
        output[:] = result[at]

    def attend(
        self,
        query,
        key,
        value,
        output,
        starts: torch.Tensor,
        longest: tuple[int, int],
        window_rows: torch.Tensor | None,
        key_starts: torch.Tensor,
        heads: slice = slice(None),
    ) -> torch.Tensor | None:
        """Causal attention of each prompt's kept tokens; its last row sees all of its keys.

        Args:
            starts, key_starts: ``[prefills + 1]`` int32, first row of each, and first key.
            longest: most rows and most keys of a prefill.
            window_rows: ``[window, prefills]``, rows whose log-denominators are wanted.
            heads: of the layer's, those that query, key, value and output have.

        Returns:
            ``[window, prefills, heads]`` fp32; None if none are wanted.
        """
        sinks = None if self.form.sinks is None else self.form.sinks[heads]
        if query.is_cuda:
            like = {"cu_seqlens_k": key_starts, "s_aux": sinks}
            wants_lse = window_rows is not None
            lse = self._flash(query, key, value, output, starts, longest, wants_lse, **like)
            return lse[window_rows] if wants_lse else None
        return self._dense(query, key, value, output, starts, window_rows, key_starts, sinks)

    def _flash(
        self, query, key, value, output, starts, longest, wants_lse: bool, **like
    ) -> torch.Tensor | None:
        """Returns the log-denominators, ``[rows, heads]`` fp32, if they are wanted."""
        result = fa_utils.flash_attn_varlen_func(
            query,
            key,
            value,
            max_seqlen_q=longest[0],
            cu_seqlens_q=starts,
            max_seqlen_k=longest[1],
            softmax_scale=self.form.scale,
            causal=True,
            window_size=self.form.flash_window,
            out=output,
            return_softmax_lse=wants_lse,
            fa_version=self.fa_version,
            **{"s_aux": self.form.sinks} | like,
        )
        return result[1].T if wants_lse else None

    def _dense(
        self, query, key, value, output, starts, window_rows, key_starts, sinks
    ) -> torch.Tensor | None:
        """The same on the CPU."""
        form = LayerForm(self.form.scale, self.form.window, sinks)
        bounds, key_bounds = starts.tolist(), key_starts.tolist()
        lse = []
        for mine, keys in zip(*(map(slice, b, b[1:]) for b in (bounds, key_bounds))):
            q, k, v = query[mine], key[keys], value[keys]
            at = torch.arange(len(k))
            seen = form.sees(at[len(k) - len(q) :], at)
            if sinks is not None:
                output[mine] = attend(q, k, v, seen, form)[0]
            elif len(q):
                heads_first = (x.transpose(0, 1)[None] for x in (q, k, v))
                output[mine] = F.scaled_dot_product_attention(
                    *heads_first, attn_mask=seen, scale=form.scale, enable_gqa=True
                )[0].transpose(0, 1)
            if window_rows is not None:
                lse.append(last_rows_lse(q, k, form.scale, len(window_rows), sinks))
        return torch.stack(lse, dim=1) if lse else None


def _bytes_of_head(query: torch.Tensor, keys: StageKeys, step: Step) -> int:
    """Of the keys and values of a step's prefills, in one head."""
    return step.num_keys[keys.stage] * query.shape[2] * query.element_size() * 2


def _keys_of_rows(
    segments: Segments, key_starts: torch.Tensor, num_prefills: int, num_rows: int
) -> torch.Tensor:
    """``[rows]`` int64, which of all prefills' keys each row's own is."""
    device = key_starts.device
    nth = torch.arange(num_prefills, device=device)
    nth = nth.repeat_interleave(segments.start.diff().long(), output_size=num_rows)
    row = torch.arange(num_rows, device=device)
    return key_starts[nth] + segments.first[nth] + row - segments.start[nth]
