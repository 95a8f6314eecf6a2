"""Attention of prefill rows with a window, written out in full."""

import pytest
import torch
from harness.world import close

from lazyllm_vllm.kernels.layer_form import LayerForm
from lazyllm_vllm.kernels.window_attention import (
    KeptRows,
    window_attention_reference,
    window_attention_triton,
)

LENS = [3, 500, 129, 1, 210]


@pytest.mark.parametrize("kept", (1.0, 0.4))
@pytest.mark.parametrize(
    "window, has_sinks, heads, kv_heads, head_dim",
    (
        (1, False, 2, 2, 64),
        (50, True, 4, 2, 64),
        (257, True, 3, 1, 80),
        (300, False, 2, 1, 256),
        (9999, False, 2, 1, 128),
    ),
)
def test_window_attention(kept, window, has_sinks, heads, kv_heads, head_dim, device, dtype):
    random = torch.Generator().manual_seed(window + head_dim)
    total = sum(LENS)
    # As the model gives them: views into one projection.
    qkv = torch.randn(total, (heads + 2 * kv_heads) * head_dim, generator=random).to(device, dtype)
    q, k, v = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], -1)
    q, k, v = (x.view(total, -1, head_dim) for x in (q, k, v))
    kept_positions = [
        torch.randperm(int(n / kept), generator=random)[:n].sort().values + 5 for n in LENS
    ]
    # As the engine's buffers, longer than the rows.
    positions = torch.cat([*kept_positions, torch.tensor([7, 7])]).to(device)
    starts = torch.tensor([0, *LENS], device=device).cumsum(0).int()
    sinks = torch.randn(heads, generator=random).to(device, dtype) + 2 if has_sinks else None
    form = LayerForm(0.3, window, sinks)

    expected = torch.empty(total, heads, head_dim, dtype=torch.float64, device=device)
    for start, n in zip(starts.tolist(), LENS):
        mine = slice(start, start + n)
        keys, values = (x[mine].double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
        back = positions[mine][:, None] - positions[mine][None, :]
        hidden = (back < 0) | (back >= window)
        logits = torch.einsum("ihd,jhd->hij", q[mine].double(), keys) * 0.3
        logits = logits.masked_fill(hidden, float("-inf"))
        if has_sinks:
            logits = torch.cat([logits, sinks.double()[:, None, None].expand(-1, n, 1)], -1)
        p = logits.softmax(-1)[..., :n]
        expected[mine] = torch.einsum("hij,jhd->ihd", p, values)
    for run in (window_attention_triton, window_attention_reference):
        wide = torch.full((total, heads + 1, head_dim), 9e9, device=device, dtype=dtype)
        run(wide[:, :heads], q, k, v, KeptRows(positions, starts, max(LENS)), form)
        close(wide[:, :heads], expected, dtype)
        assert (wide[:, heads] == wide[0, heads, 0]).all(), "nothing else is written"


def test_what_no_row_sees_has_no_influence(device, dtype):
    """Rows of another prompt, and those before the window of all rows asked about."""
    n, heads, head_dim, window = 600, 2, 64, 40
    random = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, n, heads, head_dim, generator=random).to(device, dtype)
    positions = 3 * torch.arange(n, device=device)
    starts = torch.tensor([0, 250, n], device=device).int()
    outputs = []
    for poisoned in (False, True):
        if poisoned:
            k[:250], v[:250] = 1e4, 1e4
        out = torch.full_like(q, 9e9)
        form = LayerForm(head_dim**-0.5, window)
        window_attention_triton(out, q, k, v, KeptRows(positions, starts, 350), form)
        outputs.append(out[250:])
    assert torch.equal(*outputs)
