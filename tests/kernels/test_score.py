"""Scores of keys against their reference; who is scored and who is not."""

import pytest
import torch
from harness.world import LONG, close, make_world

from lazyllm_vllm.kernels.score import (
    Queries,
    ScoreRule,
    score_tokens_reference,
    score_tokens_triton,
)


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
    queries = Queries(q, w.ints([18, 16, 17, 19]), lse, w.head_dim**-0.5)
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
