"""Attention of decode rows against its reference, and what strict masks."""

from dataclasses import replace

import pytest
import torch
from harness.world import LONG, World, close, make_world

from lazyllm_vllm.kernels.attention import (
    DecodeRows,
    paged_attention_reference,
    paged_attention_triton,
)


def inputs(w: World, strict: bool):
    """Requests 0, 2 and 3 revive tokens, 1 is padding."""
    n = len(w.prompts)
    present = [len(p) for p in w.present] if w.stage else w.prompts
    lengths = [c + d for c, d in zip(present, w.decoded)]
    lengths[1] = 0
    revived = [min(2, present[0]), 0, 3, min(1, present[3])]
    rows = w.rows(n + n * w.quota)
    rows.num_revived.copy_(w.ints(revived))
    for i in range(n):
        rows.position[i] = w.prompts[i] + w.decoded[i] - 1
        for nth in range(revived[i] if w.stage else 0):
            rows.position[n + i * w.quota + nth] = w.present[i][nth]
            w.selected[i][w.present[i][nth]] = w.stage  # as a revived token always is
    q = w.rand(len(rows.position), w.kv_heads * w.group, w.head_dim)
    decodes = DecodeRows(rows, n, w.quota if w.stage else 0, strict)
    return q, w.keys(lengths), decodes


def attend(run, q, keys, decodes, selection):
    out = torch.full_like(q, 9e9)
    lse = torch.full((len(selection.index), q.shape[1]), 9e9, device=q.device)
    run(out, lse, q, keys, decodes, q.shape[2] ** -0.5, selection)
    lse[1] = 0  # padding has none
    return out, lse


@pytest.mark.parametrize("seed", (0, 1, LONG))
@pytest.mark.parametrize("stage", (0, 1, 2))
@pytest.mark.parametrize("strict", (False, True))
def test_attention(seed, stage, strict, device, dtype):
    w = make_world(seed, stage, device=device, dtype=dtype)
    given = inputs(w, strict)
    selection = w.selection(w.prompts, 0)
    mine, theirs = (
        attend(run, *given, selection)
        for run in (paged_attention_triton, paged_attention_reference)
    )
    for a, b in zip(mine, theirs):
        close(a, b, dtype)
    assert (mine[0][1] == 0).all(), "rows of no request are zeros"


def test_strict_leaves_out_what_was_not_selected(device):
    """What strict leaves out has no influence, what it keeps has."""
    w = make_world(0, 1, device=device)
    q, keys, decodes = inputs(w, strict=True)
    selection = w.selection(w.prompts, 0)
    outputs = []
    for touched in (None, 0, 1):  # nothing; an unselected key; a selected one
        kv = keys.kv_cache.clone()
        if touched is not None:
            depth = w.selected[2][w.present[2]]
            j = int((depth == touched).nonzero()[0, 0])
            block = int(w.block_table[2][j // w.block_size])
            kv[block, :, j % w.block_size] += 5.0
        out, _ = attend(paged_attention_triton, q, replace(keys, kv_cache=kv), decodes, selection)
        outputs.append(out[2])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
