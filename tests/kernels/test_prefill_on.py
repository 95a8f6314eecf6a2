"""Attention of a chunk's rows to keys that ran before, all out of the cache: copied side by side, a
KV head at a time, or through the block table."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness.world import LONG, close, make_world

from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.hooks import prefill_attention
from lazyllm_vllm.hooks.prefill_attention import PrefillAttention
from lazyllm_vllm.kernels.layer_form import LayerForm, attend
from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.kernels.window_attention import window_attention_triton
from lazyllm_vllm.runtime.step_kind import StepKind

WAYS = {"copied": (256 << 20, 1), "a head at a time": (1, 1), "by blocks": (256 << 20, 1 << 30)}


@pytest.mark.parametrize("stage", (0, 2))
@pytest.mark.parametrize("has_sinks", (False, True))
@pytest.mark.parametrize("way", WAYS)
def test_rows_after_others(way, has_sinks, stage, device, dtype, monkeypatch):
    most, least = WAYS[way]
    monkeypatch.setattr(prefill_attention, "LEAST_ROWS", least)
    w = make_world(1, stage, device=device, dtype=dtype)
    present = [len(p) for p in w.present] if stage else w.prompts
    end = np.array([n - n % 2 for n in present], np.int32)
    first = end // 3
    rows = int((end - first).sum())
    if way == "a head at a time":
        most = int(end.sum()) * w.head_dim * 2 * w.dtype.itemsize
    monkeypatch.setattr(prefill_attention, "MOST_COPIED", most)
    starts, key_starts = (
        torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (end - first, end)
    )
    keys = w.keys(end.tolist())
    heads = w.kv_heads * w.group
    q = w.rand(rows, heads, w.head_dim)
    sinks = w.rand(heads) + 2 if has_sinks else None
    form = LayerForm(w.head_dim**-0.5, None, sinks)
    attention = PrefillAttention(form, fa_utils.get_flash_attn_version(head_size=w.head_dim), 4096)
    back = torch.arange(1, 3, device=device)
    window_rows = (starts[1:] - back[:, None]).clamp(min=0)
    step = SimpleNamespace(
        kind=StepKind.RUN,
        segments={stage: Segments(starts, 0, *w.ints([first.tolist(), [0] * len(first)]))},
        key_starts={stage: key_starts},
        longest_prefill={stage: int((end - first).max())},
        longest_keys={stage: int(end.max())},
        num_keys={stage: int(end.sum())},
        num_pairs={stage: int(((end - first) * end).sum())},
        prefills=range(len(end)),
        first_prefill=0,
        num_requests=len(end),
    )
    out = torch.full_like(q, 9e9)
    lse = attention._run_on(q, out, keys, step, window_rows)
    assert lse.shape == (2, len(end), heads)
    for i, (skipped, n, row) in enumerate(zip(first, end, starts.tolist())):
        k, v = (x[:n].double().repeat_interleave(w.group, 1) for x in keys.gather(i))
        mine = q[row : row + n - skipped].double()
        logits = torch.einsum("ihd,jhd->hij", mine, k) * form.scale
        later = torch.ones(n, n, device=device).triu(1).bool()[skipped:]
        logits = logits.masked_fill(later, float("-inf"))
        if has_sinks:
            sink = sinks.double()[:, None, None].expand(-1, n - skipped, 1)
            logits = torch.cat([logits, sink], -1)
        expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1)[..., :n], v)
        close(out[row : row + n - skipped], expected, dtype)
        for at in range(2):
            close(lse[at, i], logits[:, -1 - at].logsumexp(-1), dtype)


def test_a_window_over_keys_in_any_order(device, dtype, monkeypatch):
    """Rows that go on where tokens were decoded and revived, in slots as they came."""
    monkeypatch.setattr(prefill_attention, "window_attention", window_attention_triton)
    w = make_world(LONG, 2, decoded=(3, 1, 9, 40), device=device, dtype=dtype)
    first = np.array([len(p) for p in w.present], np.int32)
    end = first + np.array(w.decoded, np.int32)
    keys, form = w.keys(end.tolist()), LayerForm(w.head_dim**-0.5, 100, None)
    starts, key_starts = (
        torch.tensor([0, *lengths]).cumsum(0).int().to(device) for lengths in (end - first, end)
    )
    step = SimpleNamespace(
        is_shifted=True,
        longest_keys={2: int(end.max())},
        num_keys={2: int(end.sum())},
        segments={2: Segments(starts, 0, w.ints(first.tolist()), w.ints([0] * len(end)))},
        key_starts={2: key_starts},
        prefills=range(len(end)),
        num_prefills=len(end),
    )
    q = w.rand(sum(w.decoded), w.kv_heads * w.group, w.head_dim)
    out = torch.full_like(q, 9e9)
    PrefillAttention(form, None, 4096)._window_on(q, out, keys, step)
    for i, (row, count) in enumerate(zip(starts.tolist(), w.decoded)):
        mine, position = slice(row, row + count), keys.positions(i)
        assert (position.diff() < 0).any(), "in order: the test shows nothing"
        seen = form.sees(position[-count:], position)
        expected = attend(q[mine].double(), *(x.double() for x in keys.gather(i)), seen, form)[0]
        close(out[mine], expected, dtype)
