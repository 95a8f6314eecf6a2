"""Scores side by side and back, against their reference."""

import pytest
import torch
from harness.world import LONG, POISON, kept_share, make_world, same

from lazyllm_vllm.kernels import dense_scores


@pytest.mark.parametrize("seed", (0, 1, LONG))
@pytest.mark.parametrize("batch", (range(0, 4), range(1, 3), range(2, 4)))
@pytest.mark.parametrize("idle, twice", ((None, None), (1, None), (2, None), (None, 1), (3, 2)))
def test_out_and_back(seed, batch, idle, twice, device, few_splits):
    """Requests that are not active, and those outside of the batch, have no place, nor has one that
    is there twice, the last token of a long turn."""
    few_splits(2)
    w = make_world(seed, 1, device=device)
    results = []
    for run in (dense_scores._triton, dense_scores._reference):
        s = w.selection(kept_share(w, 0.5), 0)
        if idle is not None:
            s.active[2, idle] = 0
        if twice is not None:
            s.revivable[twice] -= 1
        before = s.state.score.clone()
        dense = torch.full((sum(w.prompts) + 3,), float(POISON), device=device)
        run(s, 2, batch, dense, 1.0, False)
        expected = [w.score[i] for i in batch if s.active[2, i] and i != twice]
        expected = torch.cat([*expected, torch.empty(0)]).to(device)
        assert torch.equal(dense[: len(expected)], expected)
        assert (dense[len(expected) :] == POISON).all()
        run(s, 2, batch, dense * 2, 0.5, True)
        same(s.state.score, before)
        run(s, 2, batch, dense + 1, 0.25, True)
        results.append(s)
    same(*results)
