"""Ranks against their reference, and the digits counted on the way."""

import pytest
import torch
from harness.world import LONG, POISON, kept_share, make_world, same

from lazyllm_vllm.kernels.rank import RankRule, rank_tokens_reference, rank_tokens_triton
from lazyllm_vllm.kernels.top_k import BINS


@pytest.mark.parametrize("seed", (0, 1, LONG))
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("pool", ((0, 0), (12, 5)))
@pytest.mark.parametrize("strict", (False, True))
def test_rank(seed, stage, pool, strict, device):
    w = make_world(seed, stage, device=device).with_ties()
    rule = RankRule(*pool, first_tokens=2, last_tokens=7)
    results = []
    for run in (rank_tokens_triton, rank_tokens_reference):
        s = w.selection(kept_share(w, 0.5), 0)
        run(s, stage, range(1, 4), 2, strict, rule)
        results.append(s)
    mine = results[0]
    for i in (1, 2, 3):
        if not mine.is_pruned[i]:
            continue
        at = mine.state.prompt_at(i, mine.num_prompt)
        rank, absent = mine.state.rank[at].cpu(), (mine.state.level[at] == stage).cpu()
        for first, listed in ((0, rank >= 0), (BINS, (rank >= 0) & absent)):
            digits = (rank[listed] >> 20).long().bincount(minlength=2048)
            histogram = mine.search.histogram[i, first : first + 2048].cpu()
            assert torch.equal(histogram, digits.int())
    mine.search.histogram.zero_()
    same(*results)
    at = mine.state.prompt_at(0, mine.num_prompt)
    assert (mine.state.rank[at] == POISON).all(), "request 0 was not asked for"
