"""How later stages are cut into steps, and which tokens of vLLM's budget they take."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazyllm_vllm.hooks.kv_cache import spread as scheduling
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.plan.spread import Leg, advance, least_room, work_left

WINDOW, LAYERS = 16, 33
PRUNE = [{"layer": 11, "keep": 0.5}, {"layer": 22, "keep": 0.2}]


def schedule_of(prune=PRUNE, **config) -> Schedule:
    return Schedule.build(LazyLLMConfig(prune=prune, score_window=WINDOW, **config), LAYERS)


def test_by_hand():
    """A prompt of 131,072 tokens keeps 65,536 and 26,215. A step of 8,192 tokens has 270,336
    layer-rows: 24,576 rows of a stage of 11 layers. The third step has 16,384 left of stage 1, and
    room for 8,192 of stage 2."""
    schedule = schedule_of()
    plan, ran = schedule.plan(131072), (0, 0, 0)
    assert plan.kept == (131072, 65536, 26215)
    assert work_left(schedule, plan, ran) == 11 * (65536 + 26215)
    steps = []
    while ran != plan.kept:
        ran = advance(schedule, plan, ran, 8192 * LAYERS)
        steps.append(ran[1:])
    assert steps == [(24576, 0), (49152, 0), (65536, 8192), (65536, 26215)]


@settings(deadline=None)
@given(
    keeps=st.lists(st.floats(0.1, 1), min_size=1, max_size=4),
    num_prompt=st.integers(1024, 9000),
    data=st.data(),
)
def test_stage_follows_on_stage_and_the_window_runs_at_once(keeps, num_prompt, data):
    keeps.sort(reverse=True)
    prune = [{"layer": 5 * i + 2, "keep": round(keep, 3)} for i, keep in enumerate(keeps)]
    schedule = schedule_of(prune)
    plan, ran = schedule.plan(num_prompt), (0,) * schedule.num_stages
    while ran != plan.kept:
        room = least_room(schedule) + data.draw(st.integers(0, 60000))
        before, ran = ran, advance(schedule, plan, ran, room)
        assert ran[0] == num_prompt
        assert 0 < work_left(schedule, plan, before) - work_left(schedule, plan, ran) <= room
        begun = [n > 0 for n in ran[1:]]
        done = [n == kept for n, kept in zip(ran[1:], plan.kept[1:])]
        assert begun == sorted(begun, reverse=True) and done[:-1] >= begun[1:]
        for stage in range(1, schedule.num_stages):
            left = plan.kept[stage] - ran[stage]
            last = WINDOW if stage < schedule.num_stages - 1 else 1
            assert not left or left >= last


def test_no_room():
    """What came to its end without room waits; all goes at once where there is room."""
    schedule = schedule_of()
    plan = schedule.plan(4000)
    for room in (-5, 0, 10):
        assert advance(schedule, plan, (0, 0, 0), room) == (4000, 0, 0)
    assert advance(schedule, plan, (0, 0, 0), 11 * (2000 + 800)) == plan.kept
    until = advance(schedule, plan, (0, 0, 0), 11 * (2000 + 800) - 1)
    assert until == (4000, 2000, 799)


@dataclass(eq=False)
class FakeRequest:
    request_id: str
    num_tokens: int
    num_computed_tokens: int = 0
    num_output_placeholders: int = 0
    is_prefill_chunk: bool = True


class FakeScheduler:
    """vLLM's, as far as it is looked at, with requests whose prompts are these."""

    def __init__(self, monkeypatch, budget: int, prompts: dict[str, int], **config) -> None:
        self.schedule, self.budget = schedule_of(**config), budget
        self.max_num_scheduled_tokens, self.max_model_len = budget, 100_000
        self.scheduler_config = SimpleNamespace(long_prefill_token_threshold=0)
        self.kv_cache_manager, self._inflight_prefills = object(), set()
        self.requests = {name: FakeRequest(name, n) for name, n in prompts.items()}
        self.running = list(self.requests.values())
        self.planned = SimpleNamespace(
            ran={},
            plans={name: self.schedule.plan(n) for name, n in prompts.items()},
            snapshots=SimpleNamespace(taken={}),
            kv_cache_spec=SimpleNamespace(needs=SimpleNamespace(schedule=self.schedule)),
        )
        monkeypatch.setattr(scheduling, "planned_managers", lambda manager: [self.planned])

    def step(self, counts: dict[str, int]) -> dict[str, Leg]:
        """Schedule so many tokens of requests, as vLLM does ahead of the step before."""
        for name, tokens in counts.items():
            request = self.requests[name]
            request.num_computed_tokens += tokens
            request.is_prefill_chunk = request.num_computed_tokens < request.num_tokens
            request.num_output_placeholders += not request.is_prefill_chunk
        total = sum(counts.values())
        output = SimpleNamespace(num_scheduled_tokens=counts, total_num_scheduled_tokens=total)
        scheduling.spread(self, output)
        return getattr(output, scheduling.LEGS, {})

    def aside(self) -> int:
        """Tokens that are set aside in the next step."""
        with scheduling.tokens_set_aside(self):
            return self.budget - self.max_num_scheduled_tokens


LONG, SHORT = 20_000, 2_000


def held(scheduler: FakeScheduler) -> list[str]:
    return [
        name
        for name, request in scheduler.requests.items()
        if request.num_computed_tokens == request.num_tokens - 1
    ]


def test_a_prompt_is_held_back_until_all_has_run(monkeypatch):
    """In steps of 1,024 tokens, 33,792 layer-rows. A prompt of 20,000 keeps 10,000 and 4,000, which
    is 154,000; its last chunk of 544 leaves 22 layers' room for these, and 479 tokens that nobody
    has: 27,775."""
    scheduler = FakeScheduler(monkeypatch, 1024, {"decode": 100, "long": LONG})
    scheduler.step({"decode": 100})
    for _ in range(19):
        assert scheduler.step({"decode": 1, "long": 1024}) == {} and scheduler.aside() == 0
    legs = scheduler.step({"decode": 1, "long": 544})
    assert legs == {"long": Leg((0, 0, 0), (LONG, 27775 // 11, 0))}
    assert held(scheduler) == ["long"] and not scheduler.requests["long"].num_output_placeholders
    assert scheduler.requests["long"].is_prefill_chunk
    steps, done = 1, legs["long"].until
    while held(scheduler):
        # Two tokens are the decode's and the prompt's own.
        left = work_left(scheduler.schedule, scheduler.planned.plans["long"], done)
        assert scheduler.aside() == min(1022, -(-left // LAYERS))
        (leg,) = scheduler.step({"decode": 1, "long": 1}).values()
        assert leg.ran == done
        done, steps = leg.until, steps + 1
    assert done == (LONG, 10_000, 4_000) and steps == 5  # 126,225 more, 33,748 a step at most
    assert scheduler.requests["long"].num_output_placeholders == 1
    assert scheduler.planned.ran == {} and scheduler.aside() == 0
    assert scheduler.step({"decode": 1, "long": 1}) == {}


def test_alone_all_runs_at_once(monkeypatch):
    scheduler = FakeScheduler(monkeypatch, 1024, {"decode": 100, "long": LONG})
    scheduler.requests["long"].num_computed_tokens = LONG - 32
    assert scheduler.step({"long": 32}) == {"long": Leg((0, 0, 0), (LONG, 10_000, 4_000))}
    assert not held(scheduler)
    # What is held back already runs its rest as soon as it is alone.
    scheduler.requests["long"].num_computed_tokens = LONG - 32
    ran = scheduler.step({"decode": 100, "long": 32})["long"].until
    assert scheduler.step({"long": 1}) == {"long": Leg(ran, (LONG, 10_000, 4_000))}


def test_others_that_end_in_the_step(monkeypatch):
    """A prompt in one chunk takes no more than its tokens' share, and never waits for rows of those
    before it. Of two long ones the first gets on, and the second when there is room."""
    scheduler = FakeScheduler(monkeypatch, 4096, {"first": LONG, "second": LONG, "short": SHORT})
    for name in ("first", "second"):
        scheduler.requests[name].num_computed_tokens = LONG - 64
    legs = scheduler.step({"first": 64, "second": 64, "short": SHORT})
    assert legs.keys() == {"first", "second"} and held(scheduler) == ["first", "second"]
    scheduler.requests["short"].is_prefill_chunk = False
    finished = []
    for _ in range(6):
        legs = scheduler.step({name: 1 for name in ("first", "second", "short")})
        finished += [name for name, leg in legs.items() if leg.until == (LONG, 10_000, 4_000)]
    assert finished == ["first", "second"] and not held(scheduler)


def test_little_room_is_enough(monkeypatch):
    """However many decode, the window's worth of rows runs, and so the prompt ends."""
    decodes = {f"decode {i}": 100 for i in range(63)}
    scheduler = FakeScheduler(monkeypatch, 64, decodes | {"long": 1200})
    for name in decodes:
        scheduler.requests[name].is_prefill_chunk = False
    scheduler.requests["long"].num_computed_tokens = 1199
    counts = dict.fromkeys([*decodes, "long"], 1)
    plan = scheduler.planned.plans["long"]
    scheduler.step(counts)
    left = work_left(scheduler.schedule, plan, scheduler.planned.ran["long"])
    while held(scheduler):
        assert scheduler.aside() == 0
        scheduler.step(counts)
        now = work_left(scheduler.schedule, plan, scheduler.planned.ran.get("long", plan.kept))
        assert now < left and left - now <= WINDOW * LAYERS
        left = now


def test_who_comes_before_the_rows(monkeypatch):
    """Decodes, and chunks of prompts that have been running for longer; not of later ones."""
    scheduler = FakeScheduler(
        monkeypatch, 1024, {"before": 5000, "decode": 100, "long": LONG, "after": 5000}
    )
    scheduler.requests["decode"].is_prefill_chunk = False
    scheduler.planned.ran["long"] = (LONG, 0, 0)
    assert scheduler.aside() == 0  # the one before may take a whole step
    scheduler.scheduler_config.long_prefill_token_threshold = 300
    assert scheduler.aside() == 1024 - 300 - 2
    scheduler.requests["before"].num_computed_tokens = 4900
    assert scheduler.aside() == 1024 - 100 - 2
    scheduler.planned.ran["long"] = (LONG, 10_000, 3_997)
    assert scheduler.aside() == 1  # 33 layer-rows
    assert scheduler.max_num_scheduled_tokens == 1024


@pytest.mark.parametrize("why", ("keep_mass", "goes on"))
def test_what_is_never_spread(monkeypatch, why):
    config = {"keep_mass": 0.9} if why == "keep_mass" else {}
    scheduler = FakeScheduler(monkeypatch, 1024, {"decode": 100, "long": LONG}, **config)
    if why == "goes on":
        scheduler.planned.snapshots.taken["long"] = object()
    scheduler.requests["long"].num_computed_tokens = LONG - 32
    assert scheduler.step({"decode": 100, "long": 32}) == {} and not held(scheduler)
