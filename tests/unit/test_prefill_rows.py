"""Which rows of each prefill run where and when, over whole prefills: each token once in each stage
that it must run, in order, and never more at once than a step has room for."""

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyllm_vllm.runtime.prefill_rows import Prefills, RowPlan, Span


@dataclass
class Prompt:
    """Attributes:
    hit: tokens whose first stage was found in the cache.
    kept: in each stage, of a prompt that is pruned; all of them of another.
    done: tokens that have run in stage 0, or were found.
    taken: tokens that need not run behind stage 0, of one that goes on from a snapshot.
    shift: by stage, slots less positions behind what it took.
    before, until: rows of each stage that ran in steps before, of one that is pruned and has come
        to its end, and that have run after the next step.
    ran: by stage, the slots that have run, in the order in which they did.
    """

    length: int
    hit: int
    is_pruned: bool
    kept: list[int]
    done: int = 0
    caught_up: int = 0
    ran: list[list[int]] = field(default_factory=list)
    taken: int = 0
    shift: tuple[int, ...] = ()
    before: tuple[int, ...] = ()
    until: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.caught_up = max(self.caught_up, self.taken)
        self.shift = self.shift or (0,) * len(self.kept)
        self.before = self.before or (0,) * len(self.kept)
        self.until = self.until or tuple(self.kept)

    def must_run(self, stage: int) -> list[int]:
        if stage == 0:
            return list(range(self.hit, self.length))
        if self.is_pruned:
            return list(range(self.kept[stage]))
        return [at + self.shift[stage] for at in range(self.taken, self.length)]


@st.composite
def prompts_of(draw, stages: int, window: int) -> Prompt:
    length = draw(st.integers(1, 120))
    is_pruned = draw(st.booleans())
    most_found = max(length - window, 0) if is_pruned else length - 1
    least_kept = min(length, window)  # a prompt's last tokens are always kept
    kept = draw(st.lists(st.integers(least_kept, length), min_size=stages - 1, max_size=stages - 1))
    hit = draw(st.just(0) | st.integers(0, most_found))
    kept = [length, *sorted(kept, reverse=True)] if is_pruned else [length] * stages
    ran, taken, shift = [[] for _ in range(stages)], 0, ()
    if not is_pruned and hit and draw(st.booleans()):
        taken = draw(st.integers(hit, length - 1))
        shift = (0, *(-draw(st.integers(0, taken)) for _ in range(stages - 1)))
    return Prompt(length, hit, is_pruned, kept, hit, ran=ran, taken=taken, shift=shift)


@dataclass
class Work:
    prompts: list[Prompt]
    stages: int
    window: int
    budget: int


@st.composite
def work(draw) -> Work:
    stages, window = draw(st.integers(1, 4)), draw(st.integers(1, 16))
    prompts = draw(st.lists(prompts_of(stages, window), min_size=1, max_size=5))
    return Work(prompts, stages, window, draw(st.integers(2, 150)))


def next_chunks(w: Work, data) -> tuple[list[tuple[Prompt, int]], int]:
    """Some of the prompts, how many tokens each has in a step, and how many decodes there are."""
    left = [p for p in w.prompts if p.done < p.length]
    decodes = data.draw(st.integers(0, w.budget - 1))
    room, chunks = w.budget - decodes, []
    for prompt in data.draw(st.permutations(left)):
        if room and (not chunks or data.draw(st.booleans())):
            size = data.draw(st.integers(1, min(room, prompt.length - prompt.done)))
            chunks.append((prompt, size))
            room -= size
            if prompt.is_pruned and prompt.done + size == prompt.length:
                prompt.until = draw_until(w, prompt, data)
    return chunks, decodes


def draw_until(w: Work, prompt: Prompt, data) -> tuple[int, ...]:
    """How far a prompt gets that has come to its end: whole stages, and of the next one any rows
    but the last, which run at once; or all."""
    until = list(prompt.before)
    for stage in range(1, w.stages):
        kept = prompt.kept[stage]
        at_once = min(kept, w.window if stage < w.stages - 1 else 1)
        if until[stage] < kept and data.draw(st.booleans()):
            until[stage] = data.draw(st.integers(until[stage], kept - at_once))
            return prompt.length, *until[1:]
        until[stage] = kept
    return tuple(prompt.kept)


def later_end(w: Work, prompt: Prompt, size: int) -> int:
    """Where the later stages of a prompt that is not pruned end in a step."""
    end = prompt.done + size
    waits = end < prompt.length and prompt.done - prompt.caught_up > w.budget
    return prompt.caught_up + w.budget if waits else end


def end_step(w: Work, prompt: Prompt, size: int) -> None:
    """A prompt of which rows are left gives its last token again."""
    ran = prompt.done + size if prompt.is_pruned else later_end(w, prompt, size)
    prompt.caught_up = max(prompt.caught_up, ran)
    prompt.done += size
    if prompt.is_pruned and prompt.done == prompt.length:
        prompt.before = prompt.until
        prompt.done -= prompt.until != tuple(prompt.kept)


def prefills_of(chunks: list[tuple[Prompt, int]]) -> Prefills:
    def ints(values) -> np.ndarray:
        return np.array(list(values), np.int32)

    return Prefills(
        num_prompt=ints(p.length for p, _ in chunks),
        first=ints(p.done for p, _ in chunks),
        end=ints(p.done + size for p, size in chunks),
        caught_up=ints(p.caught_up for p, _ in chunks),
        is_pruned=np.array([p.is_pruned for p, _ in chunks]),
        sees_revived=np.zeros(len(chunks), bool),
        leads=np.zeros(len(chunks), bool),
        begin=np.zeros(len(chunks), np.int32),
        before=np.zeros((len(chunks[0][0].kept), len(chunks)), np.int32),
        kept=ints(p.kept for p, _ in chunks).T,
        shift=ints(p.shift for p, _ in chunks).T,
        ran=ints(p.before for p, _ in chunks).T,
        until=ints(p.until for p, _ in chunks).T,
    )


def run(chunks: list[tuple[Prompt, int]], span: Span, stages: range) -> None:
    for stage in stages:
        for (prompt, _), first, end in zip(chunks, span.first.tolist(), span.end.tolist()):
            assert first <= end
            prompt.ran[stage] += range(first, end)


@settings(max_examples=150, deadline=None)
@given(w=work(), data=st.data())
def test_every_token_runs_once_in_each_of_its_stages(w, data):
    while any(p.done < p.length for p in w.prompts):
        chunks, decodes = next_chunks(w, data)
        prefills = prefills_of(chunks)
        plan = RowPlan.make(prefills, decodes, w.budget, w.window)
        assert len(plan.spans) == len(plan.parts) == w.stages and plan.parts[0] == []
        assert decodes + plan.spans[0].num_rows <= w.budget
        for part in [*plan.catch_up, *(part for parts in plan.parts for part in parts)]:
            assert 0 < part.num_rows <= w.budget

        run(chunks, plan.spans[0], range(1))
        for (prompt, size), first, end in zip(
            chunks, *(sum_of(plan.catch_up, at, prefills.caught_up) for at in ("first", "end"))
        ):
            is_behind = not prompt.is_pruned and prompt.caught_up < prompt.done
            if is_behind:
                assert first == prompt.caught_up
                assert end == min(prompt.done, later_end(w, prompt, size))
            else:
                assert first == end
        for stage in range(1, w.stages):
            if stage == 1:
                for part in plan.catch_up:
                    run(chunks, part, range(1, w.stages))
            for part in plan.parts[stage]:
                run(chunks, part, range(stage, stage + 1))
            check_main_rows(w, chunks, plan.spans[stage], stage, decodes)
            run(chunks, plan.spans[stage], range(stage, stage + 1))
        for prompt, size in chunks:
            ends = prompt.done + size == prompt.length
            end_step(w, prompt, size)
            if prompt.is_pruned and not ends:
                assert not any(prompt.ran[1:]), "its tokens are chosen when all have run stage 0"
            if prompt.is_pruned and ends:
                assert [len(ran) for ran in prompt.ran[1:]] == list(prompt.before[1:])
    for prompt in w.prompts:
        again = prompt.ran[0].count(prompt.length - 1) - 1
        assert prompt.ran[0] == prompt.must_run(0) + again * [prompt.length - 1]
        for stage in range(1, w.stages):
            assert prompt.ran[stage] == prompt.must_run(stage)


def sum_of(parts: list[Span], which: str, otherwise: np.ndarray) -> list[int]:
    """The bounds of parts that follow each other: the first one's first, the last one's end."""
    if not parts:
        return otherwise.tolist()
    return getattr(parts[0 if which == "first" else -1], which).tolist()


def check_main_rows(
    w: Work, chunks: list[tuple[Prompt, int]], span: Span, stage: int, decodes: int
) -> None:
    """What runs beside the decodes: every row if there is room; else of pruned prompts the last."""
    last = w.window if stage < w.stages - 1 else 1  # nobody scores in the last stage
    scoring = 0
    for (prompt, size), first, end in zip(chunks, span.first.tolist(), span.end.tolist()):
        if not prompt.is_pruned:
            end -= prompt.shift[stage]
            assert end == later_end(w, prompt, size)
            new = max(prompt.done, prompt.taken)  # behind stage 0
            assert first == min(new, end) + prompt.shift[stage]
        elif prompt.done + size < prompt.length:
            assert first == end
        else:
            kept, before = prompt.kept[stage], prompt.before[stage]
            assert end == prompt.until[stage] and before <= first <= end
            if before < end == kept:
                assert first <= kept - min(kept, last)
                scoring += min(kept, last)
    assert decodes + span.num_rows <= w.budget + scoring


@settings(max_examples=150, deadline=None)
@given(w=work(), data=st.data())
def test_the_window_scores_once_whatever_the_chunks(w, data):
    scored_by = [[] for _ in w.prompts]
    while any(p.done < p.length for p in w.prompts):
        chunks, _ = next_chunks(w, data)
        part = (x.tolist() for x in prefills_of(chunks).window_part(w.window))
        for (prompt, size), count, later, scored in zip(chunks, *part):
            mine = next(s for p, s in zip(w.prompts, scored_by) if p is prompt)
            first, end = prompt.done, prompt.done + size
            is_first_time = not prompt.before[0]
            end_step(w, prompt, size)
            assert 0 <= count <= min(size, w.window) * is_first_time
            if count:
                assert later == prompt.length - end
                # Keys that tokens of the window in earlier chunks have seen: all before this one.
                assert scored == (first if mine else 0)
            mine += range(end - count, end)
    for prompt, mine in zip(w.prompts, scored_by):
        window = range(max(prompt.length - w.window, 0), prompt.length)
        assert mine == (list(window) if prompt.is_pruned else [])


def test_rows_that_run_alike():
    """All stages run what vLLM gives unless a prompt is pruned, in this step or later, or one that
    is not has keys to catch up with."""
    alike = prefills_of([(Prompt(20, 0, False, [20, 20], done=5, caught_up=5), 3)])
    assert alike.runs_alike and not alike.prunes.any()
    behind = prefills_of([(Prompt(20, 16, False, [20, 20], done=16, caught_up=0), 3)])
    assert not behind.runs_alike
    for size in (3, 15):
        pruned = prefills_of([(Prompt(20, 0, True, [20, 9], done=5, caught_up=5), size)])
        assert not pruned.runs_alike
        assert pruned.prunes.tolist() == [size == 15]
    whole = Prefills.whole([7, 1], 3)
    assert whole.runs_alike and whole.is_last_chunk.all()
    assert whole.kept.tolist() == [[7, 1]] * 3


def test_a_step_with_room_has_no_parts():
    """By hand: two prompts of 30 tokens keep 20 and 10, beside 4 decodes: 44 rows in stage 1. In
    steps of 43 one of them runs before. In steps of 15 all but the 8 that score do, 12 of each; in
    the last stage, of 20 rows, the 9 for which there is no room."""
    prompts = [(Prompt(30, 0, True, [30, 20, 10], done=n), 30 - n) for n in (20, 29)]
    roomy = RowPlan.make(prefills_of(prompts), 4, 44, 8)
    assert roomy.parts == [[], [], []] and [s.num_rows for s in roomy.spans] == [11, 40, 20]
    tight = RowPlan.make(prefills_of(prompts), 4, 43, 8)
    (part,) = tight.parts[1]
    assert part.first.tolist() == [0, 0] and part.end.tolist() == [1, 0]
    assert tight.spans[1].first.tolist() == [1, 0] and tight.spans[1].end.tolist() == [20, 20]
    assert tight.parts[2] == [] and tight.spans[2].num_rows == 20
    tiny = RowPlan.make(prefills_of(prompts), 4, 15, 8)
    assert [[p.num_rows for p in parts] for parts in tiny.parts] == [[], [15, 9], [9]]
    assert tiny.parts[1][0].end.tolist() == [12, 3] and tiny.parts[1][1].first.tolist() == [12, 3]
    assert tiny.spans[1].first.tolist() == [12, 12] and tiny.spans[2].first.tolist() == [9, 0]


@pytest.mark.parametrize("is_alone", (False, True))
def test_the_rows_of_a_long_turn(is_alone):
    """100 tokens after 226, of which stages 1 and 2 keep 42 and 21: those that are chosen have the
    slots behind what was there, 149 and 82, however few they are, and the last 16 those behind what
    comes back, 4 and 2; or, of one that brings back nothing, all of them side by side."""
    last = 0 if is_alone else 16
    before = np.array([[226], [149], [82]], np.int32)
    kept = before + [[100 - last], [42 - last], [21 - last]]
    rest = {"num_prompt": [326], "first": [224], "end": [326 - last], "caught_up": [226]}
    rest |= {"is_pruned": [True], "sees_revived": [False], "leads": [not is_alone], "begin": [223]}
    rest |= {"before": before, "kept": kept, "until": kept, "ran": before * [[0], [1], [1]]}
    rest |= {"shift": np.zeros((3, 1), np.int32)}
    window = {"num_prompt": [326], "first": [310], "end": [326], "caught_up": [310]}
    window |= {"is_pruned": [False], "sees_revived": [True], "leads": [False], "begin": [223]}
    shift = np.array([[0], [149 + 26 + 4 - 310], [82 + 5 + 2 - 310]])
    window |= {name: before for name in ("before", "kept", "until", "ran")} | {"shift": shift}
    parts = [rest] if is_alone else [rest, window]
    prefills = Prefills(
        *(
            np.concatenate([np.asarray(part[name]) for part in parts], axis=-1)
            for name in Prefills.__dataclass_fields__
        )
    )
    plan = RowPlan.make(prefills, 1, 300, 16)
    rows = [list(zip(span.first.tolist(), span.end.tolist())) for span in plan.spans]
    if is_alone:
        assert rows == [[(224, 326)], [(149, 191)], [(82, 103)]]
    else:  # the very last is a decode's row
        assert rows == [[(224, 310), (310, 326)], [(149, 175), (179, 194)], [(82, 87), (89, 104)]]
    assert not any(plan.parts) and not plan.catch_up
    assert prefills.prunes.tolist() == [True] + [False] * (len(parts) - 1)
    assert prefills.choice[:3, 0].tolist() == [223, 226, 326 - last]
    assert prefills.choice[3:6, 0].tolist() == [226, 149, 82]
    assert prefills.choice[6:, 0].tolist() == [100 - last, 42 - last, 21 - last]
    scoring, back, scored = prefills.window_part(16)
    assert scoring.tolist() == ([16] if is_alone else [0, 16]) and not scored.any()
    assert back.tolist() == ([0] if is_alone else [16, 0])


def test_a_padded_plan_has_the_rows_that_are_missing():
    """In a prefill of nobody: in each stage as many as it takes, since later stages may have fewer
    rows of the others."""
    shift = np.array([[0, 0], [-40, -40], [-60, -60]], np.int32)
    prefills = Prefills(
        num_prompt=np.array([100, 100], np.int32),
        first=np.array([64, 84], np.int32),
        end=np.array([84, 100], np.int32),
        caught_up=np.array([70, 84], np.int32),  # 6 tokens have run behind stage 0
        is_pruned=np.zeros(2, bool),
        sees_revived=np.array([False, True]),
        leads=np.zeros(2, bool),
        begin=np.zeros(2, np.int32),
        before=np.zeros((3, 2), np.int32),
        kept=np.full((3, 2), 100, np.int32),
        shift=shift,
        ran=np.zeros((3, 2), np.int32),
        until=np.full((3, 2), 100, np.int32),
    ).padded([12])
    plan = RowPlan.make(prefills, 1, 512, 16).padded([48, 47, 47])
    assert [span.lengths.tolist() for span in plan.spans] == [
        [20, 16, 12],
        [14, 15, 18],
        [14, 15, 18],
    ]
    assert [span.first.tolist() for span in plan.spans] == [[64, 84, 0], [30, 44, 0], [10, 24, 0]]
