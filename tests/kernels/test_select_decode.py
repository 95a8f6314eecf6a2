"""Selection for decodes against its reference: who is revived."""

import pytest
import torch
from harness.world import LONG, World, kept_share, make_world, same

from lazyllm_vllm.kernels.rank import (
    RankRule,
    rank_of,
    rank_tokens_reference,
    rank_tokens_triton,
)
from lazyllm_vllm.kernels.select_decode import select_decode_reference, select_decode_triton
from lazyllm_vllm.kernels.selection import Rows, Selection

RULE = RankRule(1, 1, first_tokens=1, last_tokens=2)


def decode_rows(w: World) -> Rows:
    """The current rows of decodes, and room for what they revive."""
    n = len(w.prompts)
    rows = w.rows(n + n * w.quota)
    rows.num_revived.zero_()
    rows.num_keys.copy_(w.ints([len(p) + d for p, d in zip(w.present, w.decoded)]))
    rows.slot[:n] = rows.num_keys - 1
    rows.position[:n] = w.ints([p + d - 1 for p, d in zip(w.prompts, w.decoded)])
    return rows


def select(begin, stage: int, num_turns: int = 0, strict: bool = False) -> tuple[Selection, Rows]:
    """What the kernels make of a selection and its rows, which is what the references make of them.

    Args:
        begin: makes both, the same at every call.
    """
    results = []
    for run, rank_tokens in (
        (select_decode_triton, rank_tokens_triton),
        (select_decode_reference, rank_tokens_reference),
    ):
        s, rows = begin()
        n = len(s.index)
        rank_tokens(s, stage, range(n), 2, strict, RULE)
        run(s, stage, n, num_turns, rows, 2, strict)
        s.search.thresholds.zero_()
        s.search.split_counts.zero_()
        results.append((s, rows))
    for mine, theirs in zip(*results):
        same(mine, theirs)
    return results[0]


@pytest.mark.parametrize("seed, splits", ((0, None), (1, None), (LONG, 2)))
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("strict", (False, True))
@pytest.mark.parametrize("quota, ties", ((0, True), (3, True), (40, True), (5, False)))
def test_decode_selection(seed, splits, stage, strict, quota, ties, device, few_splits):
    if splits:
        few_splits(splits)
    w = make_world(seed, stage, quota=quota, device=device)
    w = w.with_ties() if ties else w
    n = len(w.prompts)
    kept = [*kept_share(w, 0.6)[:3], w.prompts[3]]  # the last is not pruned

    def begin():
        s = w.selection(kept, room=6)
        s.active[:, 1] = 0
        if not strict:
            s.active[:] *= s.limit > 0
        return s, decode_rows(w)

    s, rows = select(begin, stage, strict=strict)
    assert (rows.num_revived <= min(quota, 6)).all() and rows.num_revived[[1, 3]].sum() == 0
    for i in (0, 2):
        first = n + i * quota
        revived = rows.position[first : first + int(rows.num_revived[i])].cpu()
        assert (w.level[i][revived] == stage).all(), "only tokens without keys here"
        assert len(set(revived.tolist())) == len(revived)
        place = s.state.place[s.state.prompt_at(i, s.num_prompt)].cpu()
        expected = w.place[i].clone()
        if stage == 1:  # behind those that have keys, each a place of its own
            expected[revived] = len(w.present[i]) + torch.arange(len(revived))
        assert torch.equal(place, expected.int())
    if quota and seed != 1:
        assert rows.num_revived.sum() > 0


@pytest.mark.parametrize("seed, splits, ties", ((0, None, True), (1, None, False), (LONG, 2, True)))
@pytest.mark.parametrize("stage", (1, 2))
def test_a_turn_revives_as_many_as_it_is_told(seed, splits, ties, stage, device, few_splits):
    """Of the tokens without keys the best, though they be not among the best of all or score too
    little; in the slots left for them before those of the turn's tokens."""
    if splits:
        few_splits(splits)
    w = make_world(seed, stage, quota=40, device=device)
    w = w.with_ties() if ties else w
    n, seen_by = len(w.prompts), 3
    ends = [w.prompts[0] * 3 // 4, w.prompts[1], *w.prompts[2:]]  # of one some come back alone
    absent = [(w.level[i][: ends[i]] == stage).nonzero()[:, 0] for i in range(n)]
    limits = [min(len(of), 9 - i) for i, of in enumerate(absent)]

    def begin():
        s = w.selection([1] * n, room=40, least_revived=rank_of(0.9))
        s.limit[:, :2] = w.ints(limits[:2])
        s.revivable[:] = w.ints(ends)
        s.turn_tokens[:2] = seen_by
        rows = decode_rows(w)
        rows.slot[:2] += w.ints(limits[:2])
        rows.num_keys[:2] += w.ints(limits[:2])
        return s, rows

    s, rows = select(begin, stage, num_turns=2)
    assert rows.num_revived[:2].tolist() == limits[:2] and sum(limits[:2]) > 0
    assert torch.equal(rows.num_keys[:2], begin()[1].num_keys[:2])
    for i in range(2):
        mine = slice(n + i * 40, n + i * 40 + limits[i])
        rank = s.state.rank[s.state.prompt_at(i, s.num_prompt)].cpu()
        best = sorted(absent[i].tolist(), key=lambda p: (-int(rank[p]), p))[: limits[i]]
        assert set(rows.position[mine].tolist()) == set(best)
        first = int(rows.slot[i]) + 1 - seen_by - limits[i]
        assert rows.slot[mine].tolist() == list(range(first, first + limits[i]))
        place = s.state.place[s.state.prompt_at(i, s.num_prompt)].cpu()
        if stage == 1:
            at = [len(w.present[i]) + nth for nth in range(limits[i])]
            assert place[rows.position[mine].cpu()].tolist() == at


@pytest.mark.parametrize("seed, splits, least", ((0, None, 0.5), (0, None, 0.9), (LONG, 2, 0.99)))
@pytest.mark.parametrize("stage", (1, 2))
def test_what_scores_too_little_stays(seed, splits, least, stage, device, few_splits):
    if splits:
        few_splits(splits)
    quota = 200
    w = make_world(seed, stage, quota=quota, device=device)
    n = len(w.prompts)
    found = {}
    for run, rank_tokens, floor in (
        (select_decode_triton, rank_tokens_triton, 0.0),
        (select_decode_triton, rank_tokens_triton, least),
        (select_decode_reference, rank_tokens_reference, least),
    ):
        s = w.selection(kept_share(w, 0.9), room=quota, least_revived=rank_of(floor))
        rank_tokens(s, stage, range(n), 2, False, RULE)
        rows = decode_rows(w)
        run(s, stage, n, 0, rows, 2, False)
        mine = [slice(n + i * quota, n + i * quota + int(rows.num_revived[i])) for i in range(n)]
        revived = [rows.position[of].tolist() for of in mine]
        found.setdefault(floor, []).append(revived)
        ranks = [s.state.rank[s.state.prompt_at(i, s.num_prompt)] for i in range(n)]
    assert found[least][0] == found[least][1]
    (unbounded,), (bounded, _) = found[0.0], found[least]
    high = [[p for p in of if ranks[i][p] >= rank_of(least)] for i, of in enumerate(unbounded)]
    assert list(map(sorted, bounded)) == list(map(sorted, high)) != list(map(sorted, unbounded))
    assert any(bounded)
