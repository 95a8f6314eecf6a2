"""Attention of decode rows against its reference and written out plainly; what strict and a window
mask; an FP8 cache."""

from dataclasses import replace

import pytest
import torch
from harness.world import LONG, World, close, kept_share, make_world

from lazyllm_vllm.kernels.attention import paged_attention_reference, paged_attention_triton
from lazyllm_vllm.kernels.layer_form import LayerForm
from lazyllm_vllm.kernels.paged import FP8, StageKeys
from lazyllm_vllm.kernels.selection import DecodeRows

RUNS = (paged_attention_triton, paged_attention_reference)


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
            rows.request[n + i * w.quota + nth] = i
            w.selected[i][w.present[i][nth]] = w.stage  # as a revived token always is
    q = w.rand(len(rows.position), w.kv_heads * w.group, w.head_dim)
    decodes = DecodeRows(rows, n, w.quota if w.stage else 0, strict)
    return q, w.keys(lengths), decodes


def attend(run, q, keys, decodes, selection, **form):
    out = torch.full_like(q, 9e9)
    lse = torch.full((len(selection.index), q.shape[1]), 9e9, device=q.device)
    run(out, lse, q, keys, decodes, LayerForm(q.shape[2] ** -0.5, **form), selection)
    lse[1] = 0  # padding has none
    return out, lse


def partly_pruned(w: World):
    """A selection in which the last prompt is kept whole."""
    return w.selection([*kept_share(w, 0.5)[:3], w.prompts[3]], 0)


def positions_of(w: World, i: int) -> list[int]:
    """Of the keys in a request's slots."""
    decoded = range(w.prompts[i], w.prompts[i] + w.decoded[i])
    return [*(w.present[i].tolist() if w.stage else range(w.prompts[i])), *decoded]


def expected(w: World, q, keys: StageKeys, decodes: DecodeRows, window, sinks):
    """Row by row, in fp64; without strict."""
    n, scale = len(w.prompts), q.shape[2] ** -0.5
    out = torch.zeros(q.shape, dtype=torch.float64)
    lse = torch.zeros(n, q.shape[1], dtype=torch.float64)
    cache = keys.kv_cache.double().cpu()
    for i in (0, 2, 3):
        positions = torch.tensor(positions_of(w, i))
        assert len(positions) == keys.length[i]
        both = cache[w.block_table[i].cpu()].transpose(1, 2).flatten(0, 1)[: len(positions)]
        k, v = both.repeat_interleave(w.group, 1).split(w.head_dim, -1)
        k, v = k * keys.k_scale, v * keys.v_scale
        rows = [i]
        if w.stage:
            rows += [n + i * w.quota + nth for nth in range(int(decodes.rows.num_revived[i]))]
        for row in rows:
            mine = int(decodes.rows.position[row])
            seen = positions <= mine
            if window is not None:
                seen &= positions > mine - window
            logits = torch.einsum("hd,jhd->jh", q[row].double().cpu(), k) * scale
            weights = logits[seen].exp()
            total = weights.sum(0) + (0 if sinks is None else sinks.double().cpu().exp())
            out[row] = torch.einsum("jh,jhd->hd", weights / total, v[seen])
            if row < n:
                lse[row] = total.log()
    return out, lse


@pytest.mark.parametrize("seed", (0, 1, LONG))
@pytest.mark.parametrize("stage", (0, 1, 2))
@pytest.mark.parametrize("strict", (False, True))
def test_attention(seed, stage, strict, device, dtype):
    w = make_world(seed, stage, device=device, dtype=dtype)
    given = inputs(w, strict)
    selection = partly_pruned(w)
    mine, theirs = (attend(run, *given, selection) for run in RUNS)
    for a, b in zip(mine, theirs):
        close(a, b, dtype)
    assert (mine[0][1] == 0).all(), "rows of no request are zeros"


@pytest.mark.parametrize("stage", (0, 1))
@pytest.mark.parametrize(
    "seed, window, has_sinks, fp8",
    (
        (0, None, True, False),
        (0, 60, False, True),
        (1, 1, False, False),
        (1, 60, True, True),
        (1, 9999, True, False),
        (LONG, None, False, True),
        (LONG, 200, True, False),
    ),
)
def test_forms(seed, stage, window, has_sinks, fp8, device, dtype):
    """Against what each row attends to, written out."""
    w = make_world(seed, stage, device=device, dtype=dtype)
    q, keys, decodes = inputs(w, strict=False)
    if fp8:
        keys = replace(keys, kv_cache=keys.kv_cache.to(FP8), k_scale=0.7, v_scale=1.9)
    sinks = 2 * w.rand(q.shape[1]) + 1 if has_sinks else None
    selection = w.selection(w.prompts, 0)
    theirs = expected(w, q, keys, decodes, window, sinks)
    for run in RUNS:
        mine = attend(run, q, keys, decodes, selection, window=window, sinks=sinks)
        for a, b in zip(mine, theirs):
            close(a.cpu(), b, dtype)


@pytest.mark.parametrize("stage", (0, 1))
def test_a_window_hides_the_rest_from_strict_too(stage, device, dtype):
    w = make_world(1, stage, device=device, dtype=dtype)
    given = inputs(w, strict=True)
    selection = partly_pruned(w)
    form = {"window": 33, "sinks": w.rand(w.kv_heads * w.group)}
    mine, theirs = (attend(run, *given, selection, **form) for run in RUNS)
    for a, b in zip(mine, theirs):
        close(a, b, dtype)


@pytest.mark.parametrize("stage", (0, 1))
def test_what_no_row_sees_is_not_read(stage, device, dtype):
    w = make_world(1, stage, device=device, dtype=dtype)
    q, keys, decodes = inputs(w, strict=False)
    selection, window, n = w.selection(w.prompts, 0), 20, len(w.prompts)
    hidden = torch.full_like(keys.kv_cache, float("nan"))
    for i in (0, 2, 3):
        revived = range(int(decodes.rows.num_revived[i]) if stage else 0)
        rows = [int(decodes.rows.position[r]) for r in [i, *(n + i * w.quota + m for m in revived)]]
        for j, position in enumerate(positions_of(w, i)):
            if any(row - window < position <= row for row in rows):
                at = w.block_table[i, j // w.block_size], slice(None), j % w.block_size
                hidden[at] = keys.kv_cache[at]
    mine, theirs = (
        attend(paged_attention_triton, q, given, decodes, selection, window=window)
        for given in (replace(keys, kv_cache=hidden), keys)
    )
    for a, b in zip(mine, theirs):
        assert torch.equal(a, b)


def test_strict_leaves_out_what_was_not_selected(device):
    """What strict leaves out has no influence, what it keeps has; of a prompt that is not pruned it
    leaves out nothing."""
    w = make_world(0, 1, device=device)
    q, keys, decodes = inputs(w, strict=True)
    for selection, leaves_out in ((partly_pruned(w), True), (w.selection(w.prompts, 0), False)):
        outputs = []
        for touched in (None, 0, 1):  # nothing; an unselected key; a selected one
            kv = keys.kv_cache.clone()
            if touched is not None:
                depth = w.selected[2][w.present[2]]
                j = int((depth == touched).nonzero()[0, 0])
                block = int(w.block_table[2][j // w.block_size])
                kv[block, :, j % w.block_size] += 5.0
            given = q, replace(keys, kv_cache=kv), decodes, selection
            out, theirs = (attend(run, *given)[0] for run in RUNS)
            close(out, theirs, w.dtype)
            outputs.append(out[2])
        assert torch.equal(outputs[0], outputs[1]) == leaves_out
        assert not torch.allclose(outputs[0], outputs[2])
