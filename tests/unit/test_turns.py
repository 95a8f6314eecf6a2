"""Turns: their places in a batch, and how much they may revive."""

from dataclasses import make_dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lazyllm_vllm.hooks.kv_cache.reuse import _later
from lazyllm_vllm.hooks.turn_graphs import TurnGraphs
from lazyllm_vllm.hooks.turns import Turn, _with_places, split
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.request_plan import Continuation, LongTurn, RequestPlan
from lazyllm_vllm.plan.request_setting import RequestSetting
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.snapshots import Continuations
from lazyllm_vllm.runtime.turns import TurnShape

# Of each request the tokens of its prompt, those computed before, and those of this step.
REQUESTS = {
    "decode": (50, 60, 1),
    "long turn": (200, 160, 40),
    "prompt": (90, 0, 30),
    "short turn": (130, 125, 5),
    "goes on after preemption": (140, 128, 12),
}
WINDOW = 16


def vllms_batch():
    """What is read of vLLM's ``InputBatch``."""
    prompt, computed, scheduled = np.array(list(REQUESTS.values()), np.int32).T
    positions = np.concatenate([np.arange(c, c + n) for c, n in zip(computed, scheduled)])
    fields = {
        "req_ids": list(REQUESTS),
        "num_reqs": len(REQUESTS),
        "num_reqs_after_padding": len(REQUESTS),
        "idx_mapping": torch.arange(10, 10 + len(REQUESTS)),
        "idx_mapping_np": np.arange(10, 10 + len(REQUESTS)),
        "num_scheduled_tokens": scheduled,
        "num_computed_prefill_tokens_np": computed,
        "prefill_len_np": prompt,
        "is_prefilling_np": computed < prompt,
        "positions": torch.from_numpy(positions),
        "query_start_loc_np": np.concatenate([[0], np.cumsum(scheduled)]),
    }
    return make_dataclass("Batch", fields)(**fields)


def test_a_turn_has_its_places():
    """Its last token among the decodes, the tokens that see what it revives, that one too, in a
    prefill of their own, and those before in another; vLLM's rows and requests are found again."""
    batch = vllms_batch()
    turns = [
        Turn(1, 200 - WINDOW, 199, 90, False, [0, 7, 5]),
        Turn(3, 125, 129, 90, False, [0, 7, 0]),
        Turn(4, 139, 139, 90, False, [0, 7, 7]),
    ]
    tables = [torch.arange(20)[:, None] * torch.ones(1, 3).long() for _ in range(2)]
    again, found = split(batch, 1, turns, tables)
    expected = [  # who, first position, tokens
        ("long turn", 199, 1),
        ("short turn", 129, 1),
        ("decode", 60, 1),
        ("goes on after preemption", 139, 1),
        ("long turn", 160, 24),
        ("long turn", 184, 16),
        ("prompt", 0, 30),
        ("short turn", 125, 5),
        ("goes on after preemption", 128, 11),
    ]
    firsts, counts = again.num_computed_prefill_tokens_np, again.num_scheduled_tokens
    assert list(zip(again.req_ids, firsts.tolist(), counts.tolist())) == expected
    assert again.positions.tolist() == [
        position for _, first, count in expected for position in range(first, first + count)
    ]
    assert torch.equal(batch.positions[found.rows], again.positions)
    assert set(found.rows.tolist()) == set(range(int(batch.num_scheduled_tokens.sum())))
    twice = [row for row in found.rows.tolist() if found.rows.tolist().count(row) == 2]
    assert batch.positions[sorted(set(twice))].tolist() == [199, 129]
    assert again.positions[found.last_rows].tolist() == [199, 129] and min(found.last_rows) >= 4
    assert again.is_prefilling_np.tolist() == [False] * 4 + [True] * 5
    assert [batch.req_ids[i] for i in found.requests] == again.req_ids
    assert [again.req_ids[i] for i in found.sampled.tolist()] == batch.req_ids
    assert [expected[i][1:] for i in found.sampled.tolist()] == [
        (60, 1), (199, 1), (0, 30), (129, 1), (139, 1)
    ]  # fmt: skip
    for table in tables:
        assert table[: len(expected), 0].tolist() == found.requests.tolist()
    assert found.tokens.tolist() == [16, 5]
    assert found.revived.tolist() == [[0, 0], [7, 7], [5, 0]]
    assert found.ends.tolist() == [90, 90] and not found.leads.any()
    assert found.sees.tolist() == [False, True, False, True, False]
    assert found.seen.T.tolist() == [[0] * 3, [0, 7, 5], [0] * 3, [0, 7, 0], [0] * 3]


def test_a_long_turn_has_its_places():
    """As another, but that the tokens before its last ones have a place even where all of them have
    run in the first stage: later stages run some of them."""
    batch = vllms_batch()
    for first, parts in ((160, [(160, 24), (184, 16)]), (184, [(184, 0), (184, 16)])):
        batch.num_computed_prefill_tokens_np[1] = first
        batch.num_scheduled_tokens[1] = 200 - first
        batch.query_start_loc_np = np.concatenate([[0], np.cumsum(batch.num_scheduled_tokens)])
        tables = [torch.arange(20)[:, None] * torch.ones(1, 3).long()]
        turns = [Turn(1, 184, 199, 70, True, [0, 7, 5]), Turn(3, 125, 129, 90, False, [0, 7, 0])]
        again, found = split(batch, 1, turns, tables)
        firsts, counts = again.num_computed_prefill_tokens_np, again.num_scheduled_tokens
        assert list(zip(firsts.tolist(), counts.tolist()))[3:5] == parts
        assert again.req_ids[3:6] == ["long turn", "long turn", "prompt"]
        assert found.leads.tolist() == [True, False, False, False, False]
        assert found.sees.tolist() == [False, True, False, True, False]
        assert found.ends.tolist() == [70, 90]


def test_long_turns_take_the_places_that_are_left():
    turns = [Turn(i, 5, 9, 3, i < 4, []) for i in range(6)]
    for room, found in ((12, [4, 5, 0, 1, 2, 3]), (9, [4, 5, 0, 1]), (4, [4, 5]), (3, [4, 5])):
        assert [turn.request for turn in _with_places(turns, room)] == found
    many = [Turn(i, 5, 9, 3, i > 2, []) for i in range(12)]
    assert [turn.request for turn in _with_places(many, 100)] == list(range(8))
    assert _with_places(turns[4:], 0) == turns[4:], "for others the scheduler sees to it"


def test_a_turn_in_a_graph_is_padded():
    """To its shape, with decodes and a prefill of no request, whose slots and rows are none."""
    batch = vllms_batch()
    batch = replace(batch, req_ids=batch.req_ids[:2], num_reqs=2)
    for seeing, parts in ((184, [(160, 24), (184, 16)]), (160, [(160, 0), (160, 40)])):
        turn = Turn(1, seeing, 199, 90, False, [0, 7, 5])
        tables = [torch.arange(20)[:, None] * torch.ones(1, 3).long()]
        again, found = split(batch, 1, [turn], tables, TurnShape(1, decodes=3, rows=64))
        firsts, counts = again.num_computed_prefill_tokens_np, again.num_scheduled_tokens
        expected = [("long turn", 199, 1), ("decode", 60, 1), ("", 0, 1), ("", 0, 1)]
        expected += [*(("long turn", *part) for part in parts), ("", 0, 24)]
        assert list(zip(again.req_ids, firsts.tolist(), counts.tolist())) == expected
        assert again.idx_mapping.tolist() == [11, 10, -1, -1, 11, 11, -1]
        assert again.idx_mapping_np.tolist() == again.idx_mapping.tolist()
        assert again.is_prefilling_np.tolist() == [False] * 4 + [True] * 3
        assert found.rows.tolist() == [40, 0, -1, -1, *range(1, 41), *[-1] * 24]
        assert found.last_rows.tolist() == [43] and found.sampled.tolist() == [1, 0]
        assert found.sees.tolist() == [False, True]
        assert found.seen.T.tolist() == [[0, 0, 0], [0, 7, 5]]
        assert tables[0][:7, 0].tolist()[:2] == [1, 0]


def test_several_turns_in_a_graph_are_padded():
    """With turns of no request, too, which have as many places and revive nothing."""
    batch = vllms_batch()
    ids = [batch.req_ids[i] for i in (0, 1, 3)]
    where = np.array([0, 1, 3])
    scheduled = batch.num_scheduled_tokens[where]
    batch = replace(
        batch,
        req_ids=ids,
        num_reqs=3,
        idx_mapping_np=batch.idx_mapping_np[where],
        num_scheduled_tokens=scheduled,
        num_computed_prefill_tokens_np=batch.num_computed_prefill_tokens_np[where],
        prefill_len_np=batch.prefill_len_np[where],
        query_start_loc_np=np.concatenate([[0], np.cumsum(scheduled)]),
    )
    turns = [Turn(1, 184, 199, 90, False, [0, 7, 5]), Turn(2, 125, 129, 90, False, [0, 3, 0])]
    tables = [torch.arange(20)[:, None] * torch.ones(1, 3).long()]
    again, found = split(batch, 1, turns, tables, TurnShape(turns=3, decodes=2, rows=60))
    firsts, counts = again.num_computed_prefill_tokens_np, again.num_scheduled_tokens
    expected = [("long turn", 199, 1), ("short turn", 129, 1), ("", 0, 1)]
    expected += [("decode", 60, 1), ("", 0, 1)]
    expected += [("long turn", 160, 24), ("long turn", 184, 16)]
    expected += [("short turn", 125, 0), ("short turn", 125, 5), ("", 0, 0), ("", 0, 0)]
    expected += [("", 0, 15)]
    assert list(zip(again.req_ids, firsts.tolist(), counts.tolist())) == expected
    assert len(expected) == TurnShape(3, 2, 60).num_requests
    assert len(found.rows) == TurnShape(3, 2, 60).num_rows == 65
    assert again.is_prefilling_np.tolist() == [False] * 5 + [True] * 7
    assert found.rows.tolist()[:5] == [40, 45, -1, 0, -1]
    assert found.rows.tolist()[5:] == [*range(1, 46), *[-1] * 15]
    assert found.tokens.tolist() == [16, 5, 0]
    assert found.last_rows.tolist() == [5 + 39, 5 + 44, -1]
    assert found.revived.T.tolist() == [[0, 7, 5], [0, 3, 0], [0, 0, 0]]
    assert found.sees.tolist() == [False, True, False, True]
    assert found.seen.T.tolist() == [[0] * 3, [0, 7, 5], [0] * 3, [0, 3, 0]]
    assert found.sampled.tolist() == [3, 0, 1]


def test_what_a_turn_revives():
    """As many as it is to, but for the room there is and what was dropped before the stage; of a
    later stage also what it brings back into the one before."""
    plan = RequestPlan(100, (100, 50, 20), (100, 55, 60))
    row = SimpleNamespace(plan=plan, prompt_keys=(100, 51, 49), num_prompt=100, kept=plan.kept)
    continuations = Continuations(3)
    continuations._rows[7] = row
    continuations.begin("r", Continuation(num_tokens=120, prompt_block=7, copies=[]))
    assert continuations.revivable("r", plan, 64) == [0, 4, 6]
    assert continuations.revivable("r", plan, 3) == [0, 3, 3]
    assert continuations.revivable("r", plan, 0) == [0, 0, 0]
    # Of a long turn after 130 tokens: of 40 of its own 20 and 18 stay.
    turn = LongTurn(begin=100, first=130, chosen=(24, 4, 2), last=16)
    plan = RequestPlan(170, (170, 100, 68), (170, 107, 109), 200, turn)
    continuations.begin("long", Continuation(130, 7, [], plan))
    # Keys before: 51 and 49 of the prompt, 30 after it; with its own 101 and 97.
    assert continuations.revivable("long", plan, 64) == [0, 6, 8]
    assert continuations.before(["long", "r"], [plan, row.plan]).T.tolist() == [
        [130, 81, 79],
        [0] * 3,
    ]
    assert continuations.shift(["long"]).T.tolist() == [[0, 101 - 170, 97 - 170]]


@pytest.mark.parametrize(
    "budget, running, chunk, waits",
    ((64, 8, 0, True), (23, 8, 0, False), (64, 8, 15, False), (64, 8, 16, True)),
)
def test_who_waits_for_room_is_sure_to_get_it(budget, running, chunk, waits):
    """A chunk that would part the tokens that see what is revived waits, but only where a step can
    ever have as many."""
    scheduler = SimpleNamespace(
        scheduler_config=SimpleNamespace(long_prefill_token_threshold=chunk),
        max_num_scheduled_tokens=budget,
        max_num_running_reqs=running,
    )
    assert _later(scheduler, WINDOW, 5) == (0 if waits else 5)


def test_a_prompt_has_room_for_eight_turns():
    """256 tokens in every stage that drops so many, where a tenth of the dropped is less."""
    short, long = 1024, 32768
    kept = {short: (1024, 512, 205), long: (32768, 16384, 6554)}  # a half, a fifth
    tenth = {short: (52, 82), long: (1639, 2622)}
    room = {short: (256, 256), long: (1639, 2622)}
    turns = {short: 8, long: 51}
    cuts = [{"layer": 16, "keep": 0.5}, {"layer": 22, "keep": 0.2}]
    deep, exact = (
        Schedule.build(parse_config({"prune": cuts, "reuse": reuse}), 32)
        for reuse in ("deep", "exact")
    )
    for n in (short, long):
        plan = deep.plan(n)
        assert plan.kept == kept[n]
        assert [most - k for most, k in zip(plan.capacity, plan.kept)] == [0, *room[n]]
        others = exact.plan(n)
        assert [most - k for most, k in zip(others.capacity, others.kept)] == [0, *tenth[n]]
        assert deep.has_room(plan, turns[n] - 1) and not deep.has_room(plan, turns[n])
    little = deep.plan(1024, RequestSetting(keep=4.9))  # all, and 0.98: 20 are dropped
    assert little.kept == (1024, 1024, 1004) and little.capacity == (1024, 1024, 1024)
    assert deep.has_room(little, 1000), "where all may come back none is missed"
    never = deep.plan(short, RequestSetting(revive=False))
    assert never.capacity == never.kept and deep.has_room(never, 1000)


def test_the_plan_of_a_long_turn():
    """Half and a fifth of its own tokens, but never fewer than every stage keeps; what came between
    has keys everywhere; and room for a tenth of the dropped."""
    cuts = [{"layer": 16, "keep": 0.5}, {"layer": 22, "keep": 0.2}]
    config = {"prune": cuts, "reuse": "deep", "min_prompt_tokens": 600}
    schedule, default = Schedule.build(parse_config(config), 32), RequestSetting()
    before = schedule.plan(4000)
    assert before.state_room == 8000
    plan = schedule.long_turn(before, 4100, 5100, default)
    assert plan.long_turn == LongTurn(4000, 4100, (984, 484, 184), 16)
    assert plan.num_prompt == 5100 and plan.state_room == 8000
    assert plan.kept == (5100, 2000 + 100 + 500, 800 + 100 + 200)
    assert plan.capacity == (5100, 2000 + 256 + 100 + 500 + 50, 800 + 320 + 100 + 200 + 80)
    again = schedule.long_turn(replace(plan, long_turn=None), 5100, 8000, default)
    assert again.long_turn[:3] == (5100, 5100, (2884, 1434, 564))
    none = [(4100, 4611), (4100, 8001), (4100, 4100 + 32769)]
    assert [schedule.long_turn(before, *lengths, default) for lengths in none] == [None] * 3
    assert schedule.long_turn(before, 4100, 4612, default).long_turn.chosen[2] == 103 - 16
    assert schedule.long_turn(before, 4100, 5100, RequestSetting("off")) is None
    few = config | {"first_tokens": 0, "prune": [{"layer": 16, "keep": 0.01}]}
    few = Schedule.build(parse_config(few), 32)
    assert few.long_turn(few.plan(4000), 4100, 5700, default) is None, "none is chosen"
    assert few.long_turn(few.plan(4000), 4100, 5800, default).long_turn.chosen == (1684, 1)
    for other in ({"decode": "strict"}, {"keep_mass": 0.5}, {"revive_budget": 0}):
        others = Schedule.build(parse_config(config | other), 32)
        assert others.long_turn(others.plan(4000), 4100, 5100, default) is None
    exact = Schedule.build(parse_config(config | {"reuse": "exact"}), 32)
    assert exact.plan(4000).state_room == 4000 and exact.plan(500).state_room == 0


def test_the_graph_of_a_turn():
    """The least that holds it; with decodes if there are any, and only then."""
    graphs = TurnGraphs()
    shapes = [TurnShape(1, d, r) for d in (0, 8, 32) for r in (32, 64)]
    shapes += [TurnShape(t, d, 100 * t) for t in (2, 4, 8) for d in (0, 32)]
    graphs._captured = dict.fromkeys(shapes)
    assert [graphs.shape(1, 0, r) for r in (1, 32, 33)] == [(1, 0, 32), (1, 0, 32), (1, 0, 64)]
    assert [graphs.shape(1, d, 33) for d in (1, 8, 9)] == [(1, 8, 64), (1, 8, 64), (1, 32, 64)]
    several = [(1, 65), (2, 200), (3, 200), (3, 401), (4, 400), (5, 30), (8, 800)]
    found = [graphs.shape(count, 0, rows).turns for count, rows in several]
    assert found == [2, 2, 4, 8, 4, 8, 8]
    assert graphs.shape(3, 1, 20) == (4, 32, 400)
    too_much = [(1, 33, 1), (1, 0, 801), (8, 0, 801), (9, 0, 30)]
    assert [graphs.shape(*needed) for needed in too_much] == [None] * 4
