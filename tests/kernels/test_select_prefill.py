"""Selection for prefills against its reference and a plain sort: whose rows go on, and when."""

from dataclasses import dataclass, replace

import pytest
import torch
from harness.world import LONG, POISON, World, make_world, same

from lazyllm_vllm.kernels.rank import RankRule, rank_tokens_reference, rank_tokens_triton
from lazyllm_vllm.kernels.select_prefill import (
    PrefillRows,
    select_prefill_reference,
    select_prefill_triton,
)
from lazyllm_vllm.kernels.selection import Rows, Segments, Selection

RULE = RankRule(1, 1, first_tokens=1, last_tokens=2)
BEFORE, AFTER = 1, 7  # first prefill row of either stage
KERNEL = (select_prefill_triton, rank_tokens_triton)
REFERENCE = (select_prefill_reference, rank_tokens_reference)


@dataclass
class Case:
    """Requests 0 (a decode, left alone), 1 and 2 (pruned), 3 (kept whole).

    Attributes:
        there: by prefill, positions with keys in the stage before, of those to choose among.
        kept: how many of them go on.
        goes_on: the first of the pruned goes on from another, and its own tokens are chosen among:
            those from the middle on but for the last three.
    """

    w: World
    stage: int
    there: list[torch.Tensor]
    kept: list[int]
    goes_on: bool

    @classmethod
    def make(cls, seed: int, stage: int, ties: bool, device: str, goes_on: bool = False) -> "Case":
        w = make_world(seed, stage, decoded=(5, 0, 0, 0), device=device)
        w = w.with_ties() if ties else w
        there = [(w.level[i] >= stage).nonzero()[:, 0] for i in (1, 2)]
        if goes_on:
            n = w.prompts[1]
            there[0] = there[0][(there[0] >= n // 2) & (there[0] < n - 3)]
        kept = [max(8, len(t) // 3) if len(t) > 8 else len(t) for t in there]
        kept[0] -= kept[0] == len(there[0]) and goes_on
        others = torch.arange(w.prompts[3]), w.prompts[3]
        return cls(w, stage, [*there, others[0]], [*kept, others[1]], goes_on)

    @property
    def bounds(self) -> tuple[int, int, int]:
        """Of the one that goes on: the first token that was not in the prompt before, and those to
        choose among."""
        n = self.w.prompts[1]
        return n // 3, n // 2, n - 3

    def had(self, stage: int) -> list[int]:
        """By prefill, slots before those of what is chosen."""
        first = self.bounds[1] if stage == 0 else 40 - 10 * stage
        return [first * self.goes_on, 0, 0]

    @property
    def whole_before(self) -> list[tuple[int, int]]:
        before = zip(self.had(self.stage - 1), self.there)
        return [(had, had + len(there)) for had, there in before]

    @property
    def whole(self) -> list[tuple[int, int]]:
        return [(had, had + kept) for had, kept in zip(self.had(self.stage), self.kept)]

    def run(self, how, before: Segments, parts: list[Segments]) -> tuple[Selection, list[Rows]]:
        """Select all rows of the stage, part by part."""
        select_prefill, rank_tokens = how
        w, stage, pruned = self.w, self.stage, range(1, 4)
        s = w.selection([1, *self.kept], 0)
        if self.goes_on:
            choice = s.choice
            choice.begin[1], choice.first[1], choice.end[1] = self.bounds
            for at in range(w.num_stages):
                choice.before[at, 1] = self.had(at)[0]
        s.active[stage] = w.ints([0, *(int(k < len(t)) for k, t in zip(self.kept, self.there))])
        rank_tokens(s, stage, pruned, 1, False, RULE, prefill=True)
        rows = []
        for nth, part in enumerate(parts):
            rows.append(w.rows(AFTER + int(part.start[-1])))
            select_prefill(s, stage, pruned, before, PrefillRows(rows[-1], part), nth == 0)
        # What only the kernel keeps between its parts; the histogram must be clean by itself.
        s.search.thresholds.zero_()
        s.search.split_counts.zero_()
        return s, rows

    def best(self, s: Selection, nth: int) -> list[int]:
        """Positions that go on, in order: the best ranks, of equal ones the first."""
        there = self.there[nth].tolist()
        if self.kept[nth] == len(there):
            return there
        rank = s.state.rank[s.state.prompt_at(1 + nth, s.num_prompt)].tolist()
        return sorted(sorted(there, key=lambda p: (-rank[p], p))[: self.kept[nth]])

    def check(self, s: Selection, before: Segments, part: Segments, rows: Rows) -> None:
        """Each row of a part, and that no other was touched."""
        assert (rows.slot[:AFTER] == POISON).all() and (rows.request[:AFTER] == -1).all()
        for nth, there in enumerate(self.there):
            mine, first = part.of(nth), int(part.first[nth])
            slots = range(first, first + mine.stop - mine.start)
            best = self.best(s, nth)
            positions = [best[slot - self.had(self.stage)[nth]] for slot in slots]
            assert rows.slot[mine].tolist() == list(slots)
            assert rows.position[mine].tolist() == positions
            assert (rows.request[mine] == nth + 1).all()
            had = self.had(self.stage - 1)[nth]
            slot_before = {p: slot for slot, p in enumerate(there.tolist(), had)}
            at_hand = range(int(before.first[nth]), had + len(there))
            row_of = dict(zip(at_hand, range(*before.of(nth).indices(1 << 30))))
            sources = [row_of.get(slot_before[p], -1) for p in positions]
            assert rows.source[mine].tolist() == sources

    def check_state(self, s: Selection) -> None:
        """Level and place of the tokens of pruned prompts, and of no others."""
        for i in range(4):
            level, place = self.w.level[i].clone(), self.w.place[i].clone()
            if s.active[self.stage, i]:
                best = torch.tensor(self.best(s, i - 1))
                level[self.there[i - 1]] = self.stage
                level[best] = self.stage + 1
                if self.stage == 1:
                    had = self.had(1)[i - 1]
                    place[best] = torch.arange(had, had + len(best))
                    if self.goes_on and i == 1:  # the others have keys everywhere
                        begin, first, end = self.bounds
                        level[begin:first] = level[end:] = self.w.num_stages
                        place[end:] = had + len(best) + torch.arange(3)
            at = s.state.prompt_at(i, s.num_prompt)
            assert torch.equal(s.state.level[at].cpu(), level.int())
            assert torch.equal(s.state.place[at].cpu(), place.int())


@pytest.mark.parametrize("seed, splits", ((0, None), (1, None), (LONG, 2)))
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("ties", (True, False))
@pytest.mark.parametrize("goes_on", (False, True))
def test_prefill_selection(seed, splits, stage, ties, goes_on, device, few_splits):
    if splits:
        few_splits(splits)
    case = Case.make(seed, stage, ties, device, goes_on)
    before = case.w.segments(case.whole_before, BEFORE)
    after = case.w.segments(case.whole, AFTER)
    results = [case.run(how, before, [after]) for how in (KERNEL, REFERENCE)]
    for mine, theirs in zip(*((s, *rows) for s, rows in results)):
        same(mine, theirs)
    s, (rows,) = results[0]
    case.check(s, before, after, rows)
    case.check_state(s)


def _cut(spans: list[tuple[int, int]], size: int) -> list[list[tuple[int, int]]]:
    """Rows of all prefills, one after the other, in parts of ``size``."""
    rows = [(nth, slot) for nth, span in enumerate(spans) for slot in range(*span)]
    parts = []
    for at in range(0, len(rows), size):
        part = []
        for nth, (first, _) in enumerate(spans):
            slots = [slot for n, slot in rows[at : at + size] if n == nth]
            part.append((slots[0], slots[-1] + 1) if slots else (first, first))
        parts.append(part)
    return parts


@pytest.mark.parametrize("seed, splits", ((0, 1), (1, 2), (LONG, 2)))
@pytest.mark.parametrize("stage", (1, 2))
@pytest.mark.parametrize("ties", (True, False))
@pytest.mark.parametrize("at_hand", ("all", "last"))
@pytest.mark.parametrize("goes_on", (False, True))
def test_parts_are_the_whole(seed, splits, stage, ties, at_hand, goes_on, device, few_splits):
    """All but the last rows of each prefill in parts that end anywhere, then the last ones. Of the
    stage before all rows are at hand, or the last of each prompt, and none of the third."""
    few_splits(splits)
    case = Case.make(seed, stage, ties, device, goes_on)
    spans_before = case.whole_before
    if at_hand == "last":
        missing = zip(spans_before, (2, 2, 3))
        spans_before = [(had + (n - had) * some // 3, n) for (had, n), some in missing]
    before = case.w.segments(spans_before, BEFORE)
    rest = [(max(had, k - 5), k) for had, k in case.whole]
    size = max(3, sum(case.kept) // 3 + 1)
    parts = [*_cut([(had, at) for (had, _), (at, _) in zip(case.whole, rest)], size), rest]
    assert len(parts) > 2
    parts = [case.w.segments(part, AFTER) for part in parts]
    results = [case.run(how, before, parts) for how in (KERNEL, REFERENCE)]
    for mine, theirs in zip(*((s, *rows) for s, rows in results)):
        same(mine, theirs)
    s, rows = results[0]
    for part, of_part in zip(parts, rows):
        case.check(s, before, part, of_part)
    case.check_state(s)
    # Together what runs in one piece.
    whole = case.w.segments(case.whole, AFTER)
    in_one, (all_rows,) = case.run(REFERENCE, before, [whole])
    same(s.state, in_one.state)
    for name in ("position", "request", "slot", "source"):
        for nth in range(3):
            pieces = [getattr(r, name)[p.of(nth)] for p, r in zip(parts, rows)]
            assert torch.equal(torch.cat(pieces), getattr(all_rows, name)[whole.of(nth)])
    if at_hand == "last":
        sources = all_rows.source[AFTER:]
        assert (sources == -1).any() and (sources >= 0).any()


@pytest.mark.parametrize("stage", (1, 2))
def test_prompts_that_keep_all_run_chunk_by_chunk(stage, device):
    """Slots are positions. The first prefill has its chunk at hand; the second, which is padding,
    two rows more, which come from nowhere; the third, which catches up, its last rows; the fourth
    has no row to run."""
    w = make_world(1, stage, decoded=(0, 0, 0, 0), device=device)
    chunks_before = [(100, 230), (3, 9), (60, 64), (50, 70)]
    chunks = [(100, 230), (5, 9), (40, 64), (129, 129)]
    before, after = w.segments(chunks_before, BEFORE), w.segments(chunks, AFTER)
    results = []
    for run in (select_prefill_triton, select_prefill_reference):
        s, rows = w.selection(w.prompts, 0), w.rows(AFTER + 158)
        s.active[stage] = 0
        s.index[1] = -1
        state = w.state()
        run(s, stage, range(4), before, PrefillRows(rows, after), False)
        same(s.state, state, "nothing is known of such a prompt")
        results.append(rows)
    same(*results)
    rows = results[0]
    expected = []
    for nth, (first, end) in enumerate(chunks):
        row, had = before.of(nth).start, chunks_before[nth][0]
        for slot in range(first, end):
            source = row + slot - had if slot >= had and nth != 1 else -1
            expected.append((slot, slot, -1 if nth == 1 else nth, source))
    mine = (rows.position, rows.slot, rows.request, rows.source)
    assert list(zip(*(x[AFTER:].tolist() for x in mine))) == expected


@pytest.mark.parametrize("stage", (1, 2))
def test_prompts_that_go_on_have_slots_of_their_own(stage, device):
    """The first has rows that the stage before runs, too; the second fewer than stage 0, of whose
    first tokens the later stages have keys; the third has none."""
    w = make_world(1, stage, decoded=(0, 0, 0, 0), device=device)
    positions, shifts = [(310, 330), (70, 81), (90, 90), (0, 0)], (-200, -50, -11, 0)
    before_first, before_shifts = (310, 64, 80, 0), (0, 0, 0, 0) if stage == 1 else (-90, -20, 0, 0)
    chunks = [(first + shift, end + shift) for (first, end), shift in zip(positions, shifts)]
    chunks_before = [
        (first + shift, end + shift)
        for first, (_, end), shift in zip(before_first, positions, before_shifts)
    ]
    before = replace(w.segments(chunks_before, BEFORE), shift=w.ints(before_shifts))
    after = replace(w.segments(chunks, AFTER), shift=w.ints(shifts))
    results = []
    for run in (select_prefill_triton, select_prefill_reference):
        s, rows = w.selection(w.prompts, 0), w.rows(AFTER + 31)
        s.active[stage] = 0
        run(s, stage, range(4), before, PrefillRows(rows, after), False)
        results.append(rows)
    same(*results)
    rows = results[0]
    expected = []
    for nth, (first, end) in enumerate(positions):
        for position in range(first, end):
            source = before.of(nth).start + position - before_first[nth]
            expected.append((position, position + shifts[nth], nth, source))
    mine = (rows.position, rows.slot, rows.request, rows.source)
    assert list(zip(*(x[AFTER:].tolist() for x in mine))) == expected
