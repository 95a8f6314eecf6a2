"""Snapshots in vLLM's own block pool, over random lives of requests: whoever goes on from one gets
what was left there, nobody is kept from running by one, and no block is lost."""

from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
from harness.block_sets import blocks_add_up, ids
from harness.blocks import BLOCK, admit, go_on, grow, manager_of, needs_of, request_of, vectors
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request, RequestStatus

from lazyllm_vllm.hooks.kv_cache import reuse
from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

LONGEST = 300
CUTS = [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}]
CONFIG = LazyLLMConfig(
    prune=CUTS,
    min_prompt_tokens=60,
    last_tokens=8,
    score_window=8,
    revive_per_turn=1,
    reuse="deep",
)
NEEDS = needs_of(Schedule.build(CONFIG, 6))
DOCUMENTS = [[1000 * which + i for i in range(LONGEST)] for which in (1, 2)]


@dataclass
class World:
    """Attributes:
    handed_out: how often each block was.
    left: of the blocks of each snapshot how often each had been when it was left.
    """

    manager: KVCacheManager
    handed_out: dict[int, int] = field(default_factory=dict)
    left: dict[object, dict[int, int]] = field(default_factory=dict)
    went_on: list[bool] = field(default_factory=list)

    def __post_init__(self) -> None:
        pool, hand_out = self.manager.block_pool, self.manager.block_pool.get_new_blocks

        def get_new_blocks(count: int):
            blocks = hand_out(count)
            for block in blocks:
                self.handed_out[block.block_id] = self.handed_out.get(block.block_id, 0) + 1
            return blocks

        pool.get_new_blocks = get_new_blocks
        keep = self.snapshots.keep

        def note(snapshot, pool) -> None:
            blocks = [block for each in snapshot.sets for block in ids(each.blocks)]
            assert len(set(blocks)) == len(blocks)
            self.left[snapshot] = {block: self.handed_out[block] for block in blocks}
            keep(snapshot, pool)

        self.snapshots.keep = note

    @property
    def planned(self) -> list:
        return planned_managers(self.manager)

    @property
    def snapshots(self):
        return self.planned[0].snapshots

    def admit(self, request: Request, chunk: int) -> bool:
        was_free = self.manager.block_pool.get_num_free_blocks()
        if not admit(self.manager, request, chunk):
            assert self.manager.block_pool.get_num_free_blocks() == was_free
            return False
        data = SimpleNamespace(req_id=request.request_id)
        taken = self.snapshots.taken.get(request.request_id)
        reuse.hand_over(self.manager, [data])
        self.went_on.append(taken is not None)
        if taken is not None:
            self.check(request, taken.snapshot, getattr(data, reuse.CONTINUATION), taken.adopts)
        return True

    def check(self, request: Request, snapshot, continuation, adopts: bool) -> None:
        """Blocks that nobody had since are in the request's table; those that may yet be written
        are, or are copied to it in order."""
        assert snapshot.num_tokens < request.num_tokens <= 2 * snapshot.plan.num_prompt
        held = self.manager.get_blocks(request.request_id).blocks
        copies, rest = dict(continuation.copies), snapshot.rest.by_group
        assert len(copies) == (0 if adopts else sum(map(len, rest.values())))
        for group, blocks in rest.items():
            own = ids(held[group])
            full, count = ids(snapshot.full_of(group)), self.full_blocks(snapshot, group)
            assert len(full) == count and own[:count] == full
            assert own[count:][: len(blocks)] == [copies.get(block, block) for block in ids(blocks)]
        assert all(self.handed_out[block] == times for block, times in self.left[snapshot].items())

    def full_blocks(self, snapshot, group: int) -> int:
        """Those that what was kept, and what came after the prompt, fill."""
        spec = self.manager.kv_cache_config.kv_cache_groups[group].kv_cache_spec
        if isinstance(spec, PromptSpec):
            return 0
        plan = snapshot.plan
        return (plan.kept[spec.stage] + snapshot.num_tokens - plan.num_prompt) // BLOCK

    def end(self, request: Request) -> None:
        request.status = RequestStatus.FINISHED_STOPPED
        self.manager.free(request)


def prompt_of(data) -> list[int]:
    first, second = data.draw(st.permutations(DOCUMENTS))
    lengths = (data.draw(st.sampled_from(some)) for some in ([40, 64, 100, 130], [0, 3, 20, 60]))
    return [token for of, length in zip((first, second), lengths) for token in of[:length]]


@settings(max_examples=60, deadline=None)
@given(vector=vectors, num_blocks=st.integers(0, 120), data=st.data())
def test_lives_of_requests(vector, num_blocks, data):
    needs = needs_of(NEEDS.schedule, vector)
    least = needs.total(*2 * [needs.neediest_prompt(LONGEST)])
    world = World(manager_of(needs, LONGEST, least + 1 + num_blocks, caches=True))
    manager, free, live, ended = world.manager, least + num_blocks, [], []
    for step in range(data.draw(st.integers(1, 40))):
        blocks_add_up(manager)
        what = data.draw(st.sampled_from(["new", "next turn", "go on", "go on", "end", "preempt"]))
        chunk = data.draw(st.sampled_from([1, 16, 40, 300]))
        if what in ("new", "next turn") or not live:
            prompt = prompt_of(data)
            if what == "next turn" and ended:
                prompt = [*data.draw(st.sampled_from(ended)), *range(data.draw(st.integers(1, 30)))]
            request = request_of(f"r{step}", prompt[: LONGEST - 40])
            if world.admit(request, chunk):
                live.append(request)
            else:
                assert live, "it did not fit though it was alone"
                manager.free(request)  # aborted while it waits
            continue
        request = live[data.draw(st.integers(0, len(live) - 1))]
        if what == "go on":
            is_prefill = request.num_computed_tokens < request.num_tokens
            if request.num_tokens < LONGEST:
                go_on(manager, request, chunk) if is_prefill else grow(manager, request, step)
            continue
        live.remove(request)
        if what == "end":
            world.end(request)
            ended.append(list(request.all_token_ids))
        else:
            manager.free(request)
            if world.admit(request, chunk):
                live.append(request)
            else:
                manager.free(request)
    for request in live:
        world.end(request)
    assert manager.block_pool.get_num_free_blocks() == free
    assert not world.snapshots.taken
    assert manager.reset_prefix_cache() and len(world.snapshots) == 0


def outcome(length: int, spare: int) -> str:
    """What becomes of a prompt with a snapshot of 100 tokens to go on from in so many free blocks,
    the snapshot's among them."""
    world = World(manager_of(NEEDS, LONGEST, 200, caches=True))
    pool, first = world.manager.block_pool, request_of("first", DOCUMENTS[0][:100])
    assert world.admit(first, 300)
    world.end(first)
    others = pool.get_new_blocks(pool.get_num_free_blocks() - spare)
    second = request_of("second", DOCUMENTS[0][:length])
    if not world.admit(second, 300):
        return "waits"
    taken = world.snapshots.taken.get("second")
    world.end(second)
    pool.free_blocks(others)
    assert world.manager.reset_prefix_cache()
    return "anew" if taken is None else "adopts" if taken.adopts else "copies"


@pytest.mark.parametrize("length", (102, 159))
def test_what_there_is_room_for(length):
    """Copies, else the snapshot's blocks themselves, else a prompt that is pruned anew. It waits
    only if it would do so without a snapshot."""
    least = NEEDS.total(length, length)
    found = [outcome(length, spare) for spare in range(least - 2, 2 * least + 10)]
    order = ["waits", "anew", "adopts", "copies"]
    assert found == sorted(found, key=order.index)
    assert found[0] == "waits" and "waits" not in found[2:]
    assert {"adopts", "copies"} <= set(found) and ("anew" in found) == (length == 159)


def three_at_once(spare: int) -> list[str]:
    """What those do who ask for a snapshot in one step and are admitted, in so many free blocks."""
    world = World(manager_of(NEEDS, LONGEST, 400, caches=True))
    manager, pool = world.manager, world.manager.block_pool
    first = request_of("first", DOCUMENTS[0][:100])
    assert world.admit(first, 300)
    world.end(first)
    (snapshot,) = world.left
    others = pool.get_new_blocks(pool.get_num_free_blocks() - spare)
    requests = [request_of(f"r{i}", [*DOCUMENTS[0][:100], i, 0]) for i in range(3)]
    requests = [request for request in requests if admit(manager, request)]
    taken = [world.snapshots.taken.get(request.request_id) for request in requests]
    reuse.hand_over(manager, [SimpleNamespace(req_id=each.request_id) for each in requests])
    held = [
        block.block_id
        for request in requests
        for group in snapshot.rest.by_group
        for block in manager.get_blocks(request.request_id).blocks[group]
        if not (world.snapshots.taken.get(request.request_id) and block in snapshot.full_of(group))
    ]
    assert len(held) == len(set(held)), "two have the same block that may be written"
    blocks_add_up(manager, others)
    for request in requests:
        world.end(request)
    pool.free_blocks(others)
    assert manager.reset_prefix_cache()
    return ["anew" if each is None else "adopts" if each.adopts else "copies" for each in taken]


def test_nobody_takes_what_another_took_over():
    least = NEEDS.total(102, 102)
    seen = {tuple(three_at_once(spare)) for spare in range(least, 4 * least)}
    assert all(each.count("adopts") <= 1 for each in seen)
    assert {("adopts",), ("copies",), ("copies",) * 3} <= seen
    assert all("copies" not in each for each in seen if "adopts" in each), "others read it"


def test_who_goes_on():
    """100 tokens and one more, of which stages 1 and 2 have room for 58 and 33, and one more, in
    blocks of 16. Whoever begins with all of them and has up to 60 tokens more goes on with all of
    these: they take 240 pairs in the four layers behind stage 0, and a prompt of 161 tokens, of
    which 81 and 41 are kept, 244. With 60 more some of them are dropped, until the prompt is twice
    as long as the first; and with more where none may be dropped it is pruned anew."""
    world = World(manager_of(NEEDS, LONGEST, 400, caches=True))
    first = request_of("first", DOCUMENTS[0][:100])
    assert world.admit(first, 300) and grow(world.manager, first, 7)
    world.end(first)
    (snapshot,) = world.left
    stages = {
        group: getattr(of.kv_cache_spec, "stage", None)
        for group, of in enumerate(world.manager.kv_cache_config.kv_cache_groups)
    }
    later = {group: stage for group, stage in stages.items() if stage}
    full = {stage: len(snapshot.full_of(group)) for group, stage in later.items()}
    rest = {stage: len(snapshot.rest.by_group[group]) for group, stage in later.items()}
    assert (full, rest) == ({1: 3, 2: 1}, {1: 1, 2: 2})
    assert snapshot.num_tokens == 101 and snapshot.tail == [*DOCUMENTS[0][96:100], 7]
    asked = {"same": [7, 9], "longest": [7, *[9] * 59]}
    asked |= {"drops": [7, *[9] * 60], "drops most": [7, *[9] * 99]}
    goes_on = set(asked)
    asked |= {"other": [8, 9], "nothing new": [7], "too long": [7, *[9] * 100]}
    for name, more in asked.items():
        request = request_of(name, DOCUMENTS[0][:100] + more)
        assert world.admit(request, 300)
        assert world.went_on.pop() == (name in goes_on), name
        taken = world.snapshots.taken.get(name)
        is_long = taken is not None and taken.plan.long_turn is not None
        assert is_long == (name in goes_on and len(more) > 60)
        world.manager.free(request)


def test_a_long_turn_without_room_has_the_plan_of_one_that_is_pruned_anew():
    """It was asked whether it would fit as a long turn, which has as many tokens."""
    kinds, least = set(), NEEDS.total(170, 170)
    for spare in range(least, 3 * least):
        world = World(manager_of(NEEDS, LONGEST, 400, caches=True))
        pool = world.manager.block_pool
        assert world.admit(first := request_of("first", DOCUMENTS[0][:100]), 300)
        world.end(first)
        others = pool.get_new_blocks(pool.get_num_free_blocks() - spare)
        for name in ("one", "two"):
            request = request_of(name, [*DOCUMENTS[0][:100], *DOCUMENTS[1][:70]])
            if not admit(world.manager, request):
                continue
            is_long, plan = name in world.snapshots.taken, world.planned[0].plans[name]
            kinds.add((name, is_long))
            assert (plan.long_turn is not None) == is_long
            assert is_long or plan == NEEDS.schedule.plan(170)
            reuse.hand_over(world.manager, [SimpleNamespace(req_id=name)])
            blocks_add_up(world.manager, others)
    assert kinds == {("one", True), ("two", True), ("two", False)}


@pytest.mark.parametrize("more, goes_on", ((100, True), (101, False)))
def test_nobody_goes_on_from_half_of_a_prompt_or_less(more, goes_on):
    """Of 100 tokens that were pruned, where so much is kept that going on always takes less."""
    fields = CONFIG.model_dump() | {"prune": [{"layer": 5, "keep": 0.95}]}
    needs = needs_of(Schedule.build(LazyLLMConfig(**fields), 6))
    world = World(manager_of(needs, LONGEST, 400, caches=True))
    for name, length in (("first", 100), ("second", 100 + more)):
        request = request_of(name, DOCUMENTS[0][:length])
        assert world.admit(request, 300)
        world.end(request)
    assert world.went_on == [False, goes_on]


@pytest.mark.parametrize("is_admitted", (False, True))
def test_who_comes_by_the_id_of_one_that_left_does_not_go_on_from_it(is_admitted):
    """It was preempted, and aborted while it waited or after it went on or was pruned anew. vLLM
    may be told to take ids as clients give them, so the next may be anybody's."""
    for spare in (None, NEEDS.total(101, 101)):
        world = World(manager_of(NEEDS, LONGEST, 200, caches=True))
        pool, first = world.manager.block_pool, request_of("theirs", DOCUMENTS[0][:100])
        assert world.admit(first, 300) and grow(world.manager, first, 7)
        first.append_output_token_ids(8)
        world.manager.free(first)
        assert world.snapshots.preempted == {"theirs"}
        others = pool.get_new_blocks(pool.get_num_free_blocks() - spare) if spare else []
        if is_admitted:
            assert world.admit(first, 300)
        first.status = RequestStatus.FINISHED_ABORTED
        world.manager.free(first)
        assert world.snapshots.preempted == set()
        pool.free_blocks(others)
        assert world.admit(request_of("theirs", DOCUMENTS[1][:150]), 300)
        assert world.went_on.pop() is False
