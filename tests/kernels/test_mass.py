"""How many tokens of each prompt hold a share of its scores."""

import math

import pytest
import torch
from harness.world import kept_share, make_world

from lazyllm_vllm.kernels.mass import keep_by_mass
from lazyllm_vllm.kernels.rank import RankRule, rank_tokens

FIRST, LAST = 2, 3


def expected(scores: list[float], always: list[bool], mass: float) -> int:
    """By the definition, one token after the other."""
    order = sorted(range(len(scores)), key=lambda p: (not always[p], -scores[p]))
    units = [0 if always[p] else math.floor(scores[p] * 2**30) for p in order]
    wanted = math.ceil(sum(units) * mass)
    return next(k for k in range(1, len(order) + 1) if sum(units[:k]) >= wanted)


@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("mass", (0.3, 0.8, 0.99))
@pytest.mark.parametrize("least, most", ((5, 1.0), (40, 0.5)))
def test_keep_by_mass(stage, mass, least, most, device):
    """Of four prompts three are pruned now; the first two are batch indices 0 and 1."""
    w = make_world(1, stage, decoded=(0, 0, 0, 0), device=device)
    s = w.selection(kept_share(w, most), 0)
    s.active[:] = w.ints([1, 1, 0, 1])
    batch = range(4)
    rank_tokens(s, stage, batch, 1, False, RankRule(0, 0, FIRST, LAST))
    kept, keys = s.counts.kept.clone(), s.counts.prompt_keys.clone()
    count = keep_by_mass(s, stage, batch, max(w.prompts), mass, least).tolist()
    for i in batch:
        row, n = int(s.index[i]), w.prompts[i]
        now = s.counts.kept[row].tolist(), s.counts.prompt_keys[row].tolist()
        before = kept[row].tolist(), keys[row].tolist()
        if i == 2:
            assert now == before and count[i] == before[0][stage]
            continue
        rank = s.state.rank[s.state.prompt_at(i, s.num_prompt)]
        scores = rank.view(torch.float32).tolist()
        candidates = [p for p in range(n) if int(rank[p]) >= 0]
        always = [p < FIRST or p >= n - LAST for p in candidates]
        right = expected([scores[p] for p in candidates], always, mass)
        right = min(max(right, min(least, n)), before[0][stage], before[0][stage - 1])
        assert count[i] == right, i
        for mine, old in zip(now, before):
            assert mine[stage] == right
            assert mine[:stage] + mine[stage + 1 :] == old[:stage] + old[stage + 1 :]


def test_who_has_no_reserve_gets_none(device):
    """Of what the first request may keep and does not, nothing becomes room to revive in; the
    second has a reserve in one stage, and keeps all its room."""
    w = make_world(1, 1, decoded=(0, 0, 0, 0), device=device)
    s = w.selection(kept_share(w, 1.0), 0)
    s.active[:] = w.ints([1, 1, 0, 0])
    first, second = (int(at) for at in s.index[:2])
    for row in (first, second):
        s.counts.capacity[row] = s.counts.kept[row]
    s.counts.kept[second, 2] -= 1
    s.counts.prompt_keys[second, 2] -= 1
    before = s.counts.capacity.clone()
    for stage in (1, 2):
        rank_tokens(s, stage, range(4), 1, False, RankRule(0, 0, FIRST, LAST))
        count = keep_by_mass(s, stage, range(4), max(w.prompts), 0.5, 5).tolist()
        assert count[0] < before[first, stage], "a weak test"
        assert s.counts.capacity[first, stage] == count[0]
    assert s.counts.capacity[first].tolist() == s.counts.kept[first].tolist()
    assert torch.equal(s.counts.capacity[second], before[second])
