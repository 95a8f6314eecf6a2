"""The start of a step against its reference."""

import pytest
import torch
from harness.world import POISON, kept_share, make_world

from lazyllm_vllm.kernels.begin_step import begin_step_reference, begin_step_triton
from lazyllm_vllm.kernels.selection import Rows


@pytest.mark.parametrize("quota", (0, 1, 5))
@pytest.mark.parametrize("always", (False, True))
@pytest.mark.parametrize(
    "num_decodes, num_turns, row", ((0, 0, 0), (4, 0, 3), (4, 1, 3), (4, 1, -1))
)
def test_begin_step(quota, always, num_decodes, num_turns, row, device):
    """Requests that decode, one of them padding, or the last token of a turn, and requests that
    are prefilled."""
    w = make_world(0, 1, quota=quota, device=device)
    n, stages = len(w.prompts), w.num_stages
    turns = num_turns, 7 * num_turns
    revive_rows = num_decodes * quota + 1 + 7 * num_turns if quota else 0
    if num_decodes:
        positions = torch.tensor([p + d for p, d in zip(w.prompts, w.decoded)], device=device)
        segments = w.segments([], 0)
    else:
        spans = [(p // 3, p - 1) for p in w.prompts]  # neither from the start nor to the end
        positions = torch.cat([torch.arange(*span) for span in spans]).to(device)
        segments = w.segments(spans, 0)
    results = []
    for run in (begin_step_triton, begin_step_reference):
        s = w.selection(kept_share(w, 0.5), 3)
        index = s.index.long()
        counts = s.counts
        counts.prompt_keys[index[0]] += torch.arange(stages, device=device).int() % 2
        counts.capacity[index[2]] = 0  # no room left
        counts.kept[index[3]] = w.prompts[3]  # kept whole
        counts.kept[index, 0] = s.num_prompt
        s.index[1] = -1
        s.turn_limit[1:, 0], s.turn_row[0], s.turn_end[0] = 6, row, 11
        written = "num_prompt is_pruned state_room active limit first_row revivable".split()
        for name in written:
            getattr(s, name).fill_(POISON)
        rows = Rows.make(stages, len(positions) + revive_rows, n, device)
        for name in Rows.__dataclass_fields__:
            getattr(rows, name).fill_(POISON)
        run(s, rows, positions, segments, num_decodes, turns, revive_rows, always)
        rows.slot[:, 1] = 0  # padding has none
        results.append((s, rows))
    (s, rows), theirs = results
    for name in written:
        assert torch.equal(getattr(s, name), getattr(theirs[0], name)), name
    for name in Rows.__dataclass_fields__:
        assert torch.equal(getattr(rows, name), getattr(theirs[1], name)), name
    assert s.num_prompt.tolist() == [w.prompts[0], 0, w.prompts[2], w.prompts[3]]
    assert s.is_pruned.tolist() == [1, 0, 1, 0]
    rooms = s.counts.state_room[s.index.clamp(min=0).long()]
    assert torch.equal(s.state_room, rooms) and len(set(rooms.tolist())) > 2
    before = w.ints([11 if num_turns else w.prompts[0], 0, *w.prompts[2:]])
    assert torch.equal(s.revivable, before if num_decodes else s.num_prompt)
    if num_decodes == n:
        assert rows.num_keys[:, 1].tolist() == [0] * stages
        assert (s.active[1:, 2] == int(always)).all(), "without room only marking selects"
        assert (s.active[1:, 0] == int(always or quota > 0)).all()
        assert (rows.request[1:, n : n + revive_rows] == -1).all()
        assert (rows.source[1:, n : n + revive_rows] == -1).all()
        assert rows.source[2, :n].tolist() == list(range(n))
        # In stage 0 a turn's last token may be a prefill's row.
        is_elsewhere = num_turns > 0 and row >= 0
        assert rows.source[1, :n].tolist() == [3 if is_elsewhere else 0, *range(1, n)]
        assert (rows.num_keys[0, 0] == 0).item() == is_elsewhere and rows.num_keys[1, 0] > 0
        # What a turn revives takes the slots before its tokens, and the rows before the others'.
        had = s.counts.prompt_keys[s.index.long()].T + w.ints(w.decoded)
        assert torch.equal(rows.slot[1:, 0], had[1:, 0] + 6 * num_turns)
        assert rows.slot[0, 0] == had[0, 0] and torch.equal(rows.slot[:, 2:n], had[:, 2:])
        if quota:
            first = 7 if num_turns else quota
            assert s.first_row.tolist() == [n, *(n + first + i * quota for i in range(3))]
            assert (s.limit[1:, 0] == 6).all() == bool(num_turns)
    else:
        assert (s.active == POISON).all(), "whether a prefill selects is said elsewhere"
        assert torch.equal(rows.position[0, : len(positions)], positions)
        owner = torch.repeat_interleave(torch.tensor([0, -1, 2, 3]), segments.start.diff().cpu())
        assert torch.equal(rows.request[0, : len(positions)].cpu(), owner.int())
