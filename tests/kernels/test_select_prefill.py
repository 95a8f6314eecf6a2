"""Selection for prefills against its reference: whose rows go on."""

import pytest
import torch
from harness.world import LONG, make_world, same

from lazyllm_vllm.kernels.rank import RankRule, rank_tokens_reference, rank_tokens_triton
from lazyllm_vllm.kernels.select_prefill import (
    PrefillRows,
    select_prefill_reference,
    select_prefill_triton,
)
from lazyllm_vllm.kernels.selection import Segments

RULE = RankRule(3, first_tokens=1, last_tokens=2)


@pytest.mark.parametrize("seed, splits", ((0, None), (1, None), (LONG, 2)))
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("ties", (True, False))
def test_prefill_selection(seed, splits, stage, ties, device, few_splits):
    """Requests 0 (a decode, left alone), 1 and 2 (pruned), 3 (kept whole)."""
    if splits:
        few_splits(splits)
    w = make_world(seed, stage, decoded=(5, 0, 0, 0), device=device)
    w = w.with_ties() if ties else w
    there = [(w.level[i] >= stage).nonzero()[:, 0] for i in (1, 2)]
    there.append(torch.arange(w.prompts[3]))
    kept = [max(8, len(t) // 3) if len(t) > 8 else len(t) for t in there[:2]] + [w.prompts[3]]

    def segments(lengths, base):
        return Segments(w.ints([0, *torch.tensor(lengths).cumsum(0).tolist()]), base)

    old, new = segments([len(t) for t in there], 1), segments(kept, 1 + 6)
    before = w.rows(1 + sum(map(len, there)))
    before.position[1:] = torch.cat(there).to(device)
    results = []
    for run, rank_tokens in (
        (select_prefill_triton, rank_tokens_triton),
        (select_prefill_reference, rank_tokens_reference),
    ):
        s = w.selection([1, *kept[:2], w.prompts[3]], 0)
        s.active[stage] = w.ints([0, *(int(k < len(t)) for k, t in zip(kept, there))])
        rank_tokens(s, stage, range(1, 4), 1, False, RULE)
        after = w.rows(7 + sum(kept))
        run(s, stage, 1, PrefillRows(before, old), PrefillRows(after, new), True)
        # What only the kernel keeps between its parts; the histogram must be clean by itself.
        s.search.thresholds.zero_()
        s.search.split_counts.zero_()
        results.append((s, after))
    for mine, theirs in zip(*results):
        same(mine, theirs)
    _, after = results[0]
    for nth, t in enumerate(there):
        mine = after.position[new.of(nth)].cpu()
        assert len(mine) == kept[nth] and (mine.diff() > 0).all()
        assert set(mine.tolist()) <= set(t.tolist())
        assert torch.equal(before.position[after.source[new.of(nth)].long()].cpu(), mine)
        assert after.slot[new.of(nth)].tolist() == list(range(kept[nth]))
        assert (after.request[new.of(nth)] == nth + 1).all()
