"""Attention of prefill rows: each prompt by itself, and what scoring starts from."""

import pytest
import torch
from harness.world import close

from vllm.v1.attention.backends import fa_utils

from lazyllm_vllm.hooks.prefill_attention import PrefillAttention
from lazyllm_vllm.kernels.layer_form import LayerForm


@pytest.mark.parametrize("has_sinks", (False, True))
@pytest.mark.parametrize("ran", ((0, 0, 0, 0), (1, 0, 64, 500)))
def test_prefill_attention(ran, has_sinks, device, dtype):
    """Of each prompt ``ran`` tokens have only keys, of one of them all."""
    random = torch.Generator().manual_seed(0)
    lens, heads, kv_heads, head_dim, window = [3, 130, 64, 517], 8, 2, 64, 4
    total = sum(lens)
    # As the model gives them: views into one projection.
    qkv = torch.randn(total, (heads + 2 * kv_heads) * head_dim, generator=random).to(device, dtype)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q, k, v = (x.view(total, -1, head_dim) for x in (q, k, v))
    num_rows = [n - skipped for n, skipped in zip(lens, ran)]
    row_starts, key_starts = (
        torch.tensor([0, *lengths], device=device).cumsum(0).int() for lengths in (num_rows, lens)
    )
    at_hand = torch.cat([torch.arange(skipped, n) for n, skipped in zip(lens, ran)])
    prompt = torch.arange(4).repeat_interleave(torch.tensor(num_rows))
    q = q[at_hand.to(device) + key_starts[prompt.to(device)]] if any(ran) else q
    sinks = torch.randn(heads, generator=random).to(device, dtype) + 2 if has_sinks else None
    form = LayerForm(head_dim**-0.5, None, sinks)
    attention = PrefillAttention(form, fa_utils.get_flash_attn_version(head_size=head_dim), 4096)
    out = torch.full((len(q), heads, head_dim), 9e9, device=device, dtype=dtype)
    back = torch.arange(1, window + 1, device=device)
    window_rows = (row_starts[1:] - back[:, None]).clamp(min=0)
    longest = max(num_rows), max(lens)
    lse = attention.attend(q, k, v, out, row_starts, longest, window_rows, key_starts)
    assert lse.shape == (window, len(lens), heads)
    for i, (n, skipped) in enumerate(zip(lens, ran)):
        rows = slice(int(row_starts[i]), int(row_starts[i + 1]))
        mine = slice(int(key_starts[i]), int(key_starts[i]) + n)
        keys, values = (x[mine].double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        logits = torch.einsum("ihd,jhd->hij", q[rows].double(), keys) * form.scale
        later = torch.ones(n, n, device=device).triu(1).bool()[skipped:]
        logits = logits.masked_fill(later, float("-inf"))
        if has_sinks:  # a key more that all see, with no value
            sink = sinks.double()[:, None, None].expand(-1, n - skipped, 1)
            logits = torch.cat([logits, sink], -1)
        p = logits.softmax(-1)[..., :n]
        expected = torch.einsum("hij,jhd->ihd", p, values)
        close(out[rows], expected, dtype)
        for back in range(min(window, n - skipped)):
            close(lse[back, i], logits[:, -1 - back].logsumexp(-1), dtype)
    again = torch.empty_like(out)
    assert attention.attend(q, k, v, again, row_starts, longest, None, key_starts) is None
    close(again, out, dtype)
