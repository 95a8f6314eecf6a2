"""Scores of keys against their reference; who is scored and who is not; an FP8 cache."""

from dataclasses import replace

import pytest
import torch
from harness.world import LONG, World, close, make_world

from lazyllm_vllm.kernels.paged import FP8
from lazyllm_vllm.kernels.queries import Queries, ScoreRule, WindowPart, last_rows_lse
from lazyllm_vllm.kernels.score import (
    score_tokens_reference,
    score_tokens_triton,
)


def in_one_piece(w: World, window: int) -> WindowPart:
    """The whole window of every prompt, in this step."""
    none = w.ints([0] * len(w.prompts))
    return WindowPart(none + window, none, none)


@pytest.mark.parametrize("seed", (0, 1, LONG))
@pytest.mark.parametrize(
    "stage, window, peak", ((0, 4, False), (0, 16, True), (2, 1, True), (2, 16, True))
)
def test_score(seed, stage, window, peak, device, dtype):
    """Of requests 1 to 3, one is not to be scored."""
    w = make_world(seed, stage, device=device, dtype=dtype)
    present = [len(p) for p in w.present] if stage else w.prompts
    keys = w.keys([c + d for c, d in zip(present, w.decoded)])
    q = w.rand(20, w.kv_heads * w.group, w.head_dim)
    lse = torch.randn(window, 5, q.shape[1], generator=w.random).to(device) + 6
    part = in_one_piece(w, window)
    queries = Queries(q, w.ints([18, 16, 17, 19]), lse, w.head_dim**-0.5, part)
    active = w.ints([1, 1, 1, 0])
    results = []
    for run in (score_tokens_triton, score_tokens_reference):
        s = w.selection(w.prompts, 0)
        before = s.state.score.clone()
        run(s, queries, keys, range(1, 4), active, ScoreRule(peak, accumulates=False))
        at = [s.state.prompt_at(i, s.num_prompt) for i in range(4)]
        scored = s.state.score.clone()
        if peak:  # a higher score stays
            floor = scored.clone()
            floor[at[2][::3]] = 0.5
            s.state.score.copy_(floor)
            run(s, queries, keys, range(1, 4), active, ScoreRule(peak, accumulates=True))
            assert (s.state.score[at[2]] >= floor[at[2]]).all()
        results.append((scored, s.state.score))
    touched = torch.cat([at[1], at[2]])
    for mine, theirs in zip(*results):
        # Scores are small and their order is what counts.
        close(mine[touched], theirs[touched], dtype, atol=0)
    scored = results[0][0]
    mine = at[2][w.present[2].to(device)] if stage else at[2]
    assert (scored[mine] >= 0).all() and (scored[mine] != before[mine]).all(), "all with keys"
    for other in (0, 3):
        assert torch.equal(scored[at[other]], before[at[other]]), "others are passed over"


@pytest.mark.parametrize("peak", (False, True))
def test_a_kv_head_s_queries_in_parts(peak, monkeypatch, device, dtype):
    """As a large group of heads with a wide window has them: the last part is not full."""
    w, window = make_world(1, 2, device=device, dtype=dtype), 15
    keys = w.keys([len(p) + d for p, d in zip(w.present, w.decoded)])
    q = w.rand(20, w.kv_heads * w.group, w.head_dim)
    lse = torch.randn(window, 5, q.shape[1], generator=w.random).to(device) + 6
    queries = Queries(q, w.ints([18, 16, 17, 19]), lse, w.head_dim**-0.5, in_one_piece(w, window))
    assert w.group * window % 16 and w.group * window > 32
    scores = []
    for run, at_once in ((score_tokens_triton, 16), (score_tokens_reference, None)):
        monkeypatch.setattr("lazyllm_vllm.kernels.score.queries_at_once", lambda *_: at_once)
        s = w.selection(w.prompts, 0)
        run(s, queries, keys, range(4), w.ints([1] * 4), ScoreRule(peak, accumulates=False))
        at = [s.state.prompt_at(i, s.num_prompt) for i in range(4)]
        scores.append(s.state.score[torch.cat(at)])
    close(*scores, dtype, atol=0)


def test_a_share_of_the_last_steps_score_stays_if_it_is_higher(device, dtype):
    w = make_world(0, 0, device=device, dtype=dtype)
    keys = w.keys([c + d for c, d in zip(w.prompts, w.decoded)])
    q = w.rand(20, w.kv_heads * w.group, w.head_dim)
    lse = torch.randn(1, 5, q.shape[1], generator=w.random).to(device) + 6
    queries = Queries(q, w.ints([18, 16, 17, 19]), lse, w.head_dim**-0.5, in_one_piece(w, 1))
    for run in (score_tokens_triton, score_tokens_reference):
        s = w.selection(w.prompts, 0)
        at = s.state.prompt_at(2, s.num_prompt)
        active = w.ints([0, 0, 1, 0])
        run(s, queries, keys, range(4), active, ScoreRule(peak=True, accumulates=False))
        new = s.state.score[at].clone()
        before = torch.where(torch.arange(len(at), device=device) % 2 > 0, 5 * new, new)
        s.state.score[at] = before
        run(s, queries, keys, range(4), active, ScoreRule(True, accumulates=False, carry=0.5))
        close(s.state.score[at], torch.maximum(new, before / 2), dtype, atol=0)


@pytest.mark.parametrize("stage, window, peak", ((0, 4, False), (2, 16, True)))
def test_fp8_keys_score_as_what_they_stand_for(stage, window, peak, device, dtype):
    w = make_world(1, stage, device=device, dtype=dtype)
    present = [len(p) for p in w.present] if stage else w.prompts
    keys = w.keys([c + d for c, d in zip(present, w.decoded)])
    fp8 = replace(keys, kv_cache=keys.kv_cache.to(FP8), k_scale=0.5, v_scale=7.0)
    keys = replace(keys, kv_cache=fp8.kv_cache.to(dtype) / 2)
    q = w.rand(20, w.kv_heads * w.group, w.head_dim)
    lse = torch.randn(window, 5, q.shape[1], generator=w.random).to(device) + 6
    part = in_one_piece(w, window)
    queries = Queries(q, w.ints([18, 16, 17, 19]), lse, w.head_dim**-0.5, part)
    scores = []
    for run, given in (
        (score_tokens_triton, keys),
        (score_tokens_triton, fp8),
        (score_tokens_reference, fp8),
    ):
        s = w.selection(w.prompts, 0)
        rule = ScoreRule(peak, accumulates=False)
        run(s, queries, given, range(4), w.ints([1] * 4), rule)
        at = [s.state.prompt_at(i, s.num_prompt) for i in range(4)]
        scores.append(s.state.score[torch.cat(at)])
    for other in scores[1:]:
        close(other, scores[0], dtype, atol=0)


@pytest.mark.parametrize("has_sinks", (False, True))
@pytest.mark.parametrize("rows, n", ((2, 2), (30, 30), (0, 0), (0, 30), (3, 30), (29, 30)))
def test_last_rows_lse(has_sinks, rows, n):
    """``rows`` of a prompt's ``n`` tokens are at hand."""
    random = torch.Generator().manual_seed(n)
    q, k = (torch.randn(n, heads, 16, generator=random) for heads in (6, 2))
    sinks = torch.randn(6, generator=random).bfloat16() if has_sinks else None
    lse = last_rows_lse(q[n - rows :], k, 0.3, 4, sinks)
    assert lse.shape == (4, 6)
    for back in range(4):
        for head in range(6):
            expected = torch.tensor(0.0)
            if back < rows:
                logits = 0.3 * k[: n - back, head // 3] @ q[n - 1 - back, head]
                sink = [sinks[head].float()] if has_sinks else []
                expected = torch.stack([*logits, *sink]).exp().sum().log()
            close(lse[back, head], expected, torch.float32)
