"""Requests that share a prefix: stock vLLM's hits less what a prompt's window must run again,
blocks of their own for all else, and none lost in whatever order requests come, stop and go."""

from dataclasses import dataclass, field

from harness.blocks import (
    BLOCK,
    admit,
    go_on,
    grow,
    hit_of,
    manager_of,
    needs_of,
    request_of,
    schedules,
    stock_manager,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule

LONGEST = 300
DOCUMENTS = [[1000 * which + i for i in range(LONGEST)] for which in (1, 2)]


@st.composite
def prompts(draw) -> list[int]:
    """The beginning of a document, and sometimes a part of the other one behind it."""
    first, second = draw(st.permutations(DOCUMENTS))
    prompt = first[: draw(st.integers(1, 200))]
    return prompt + second[: draw(st.just(0) | st.integers(1, 60))]


def most_found(schedule: Schedule, length: int) -> int:
    """Tokens that a prompt may find: whole blocks, and none that the window must run."""
    plan = schedule.plan(length)
    runs = schedule.config.score_window if plan.is_pruned else 1
    return max(length - runs, 0) // BLOCK * BLOCK


def check_owners(manager: KVCacheManager, live: list[Request]) -> None:
    """A block is one request's, or the same block in several that are not pruned, or of the first
    stage."""
    owners = {}
    for request in live:
        held = manager.get_blocks(request.request_id).blocks
        planned = planned_managers(manager)  # none: no prompt is pruned
        is_pruned = planned and planned[0].plans[request.request_id].is_pruned
        for group, (of, blocks) in enumerate(zip(manager.kv_cache_config.kv_cache_groups, held)):
            is_own = is_pruned and not of.kv_cache_spec.prefix_cacheable
            for at, block in enumerate(blocks):
                owner = (group, at, request if is_own else None)
                assert owners.setdefault(block.block_id, owner) == owner
    held_by = manager.block_pool.num_gpu_blocks - 1 - manager.block_pool.get_num_free_blocks()
    assert held_by == len(owners)


def free_all(manager: KVCacheManager, live: list[Request], order: list[int], free: int) -> None:
    for at in order:
        manager.free(live[at])
    assert manager.block_pool.get_num_free_blocks() == free
    for each in manager.coordinator.single_type_managers:
        assert not each.req_to_blocks and not getattr(each, "plans", None)
    assert manager.coordinator.reset_prefix_cache(), "a block is still held"


@dataclass
class Both:
    """The same lives with LazyLLM and without."""

    ours: KVCacheManager
    stock: KVCacheManager
    live: list[tuple[Request, Request]] = field(default_factory=list)

    def begin(self, mine: Request, theirs: Request, chunk: int) -> tuple[int, int]:
        """Both get as far. What each of them found."""
        hits = hit_of(self.ours, mine), hit_of(self.stock, theirs)
        end = min(max(hits) + chunk, mine.num_tokens)
        for manager, request, hit in zip((self.ours, self.stock), (mine, theirs), hits):
            assert admit(manager, request, end - hit)
            assert request.num_computed_tokens == end
        return hits

    def go_on(self, at: int, chunk: int) -> None:
        for manager, request in zip((self.ours, self.stock), self.live[at]):
            if request.num_computed_tokens < request.num_tokens:
                assert go_on(manager, request, chunk)
            else:
                assert grow(manager, request, token=7)

    def free(self, at: int) -> tuple[Request, Request]:
        pair = self.live.pop(at)
        for manager, request in zip((self.ours, self.stock), pair):
            manager.free(request)
        return pair


@settings(max_examples=80, deadline=None)
@given(schedule=schedules(), vector=vectors, data=st.data())
def test_hits_are_stock_vllms_less_the_window(schedule, vector, data):
    """New requests, more chunks, generated tokens, ends, and preemptions in the middle of a prompt
    or behind it, in any order; in a cache that forgets nothing."""
    both = Both(manager_of(needs_of(schedule, vector), LONGEST, 8000, caches=True), None)
    both.stock = stock_manager(LONGEST, 8000)
    free = both.ours.block_pool.get_num_free_blocks()

    def begin(pair: tuple[Request, Request]) -> None:
        mine, theirs = both.begin(*pair, chunk=data.draw(st.sampled_from([1, 16, 40, 300])))
        assert mine == min(theirs, most_found(schedule, pair[0].num_tokens))
        both.live.append(pair)

    for step in range(data.draw(st.integers(1, 25))):
        what = data.draw(st.sampled_from(["new", "go on", "go on", "preempt", "end"]))
        if what == "new" or not both.live:
            prompt = data.draw(prompts())
            begin(tuple(request_of(f"r{step}", prompt) for _ in range(2)))
            continue
        at = data.draw(st.integers(0, len(both.live) - 1))
        if what == "go on":
            both.go_on(at, data.draw(st.sampled_from([1, 16, 33])))
        else:
            pair = both.free(at)
            if what == "preempt":
                begin(pair)
        check_owners(both.ours, [mine for mine, _ in both.live])
    live = [mine for mine, _ in both.live]
    free_all(both.ours, live, data.draw(st.permutations(range(len(live)))), free)


@settings(max_examples=25, deadline=None)
@given(schedule=schedules())
def test_a_prompt_of_any_length_finds_all_that_it_may(schedule):
    manager = manager_of(needs_of(schedule), LONGEST, 8000, caches=True)
    assert admit(manager, request_of("whole", DOCUMENTS[0]))
    found = [hit_of(manager, request_of("r", DOCUMENTS[0][:n])) for n in range(1, LONGEST)]
    assert found == [most_found(schedule, n) for n in range(1, LONGEST)]


@settings(max_examples=80, deadline=None)
@given(schedule=schedules(), vector=vectors, num_blocks=st.integers(20, 150), data=st.data())
def test_nothing_is_lost_where_there_is_little_room(schedule, vector, num_blocks, data):
    """Prefixes are evicted, requests wait and are preempted, in the middle of their prompts too; a
    request alone always gets on if its blocks are as many as there are."""
    needs = needs_of(schedule, vector)
    least = needs.total(*2 * [needs.neediest_prompt(LONGEST)])
    manager = manager_of(needs, LONGEST, least + 1 + num_blocks, caches=True)
    free, live = least + num_blocks, []
    for step in range(data.draw(st.integers(1, 40))):
        chunk = data.draw(st.sampled_from([1, 16, 40, 300]))
        if not live or data.draw(st.booleans()):
            request = request_of(f"r{step}", data.draw(prompts()))
            found = hit_of(manager, request)
            assert found <= most_found(schedule, request.num_tokens)
            if admit(manager, request, chunk):
                live.append(request)
            else:
                assert live, "it did not fit though it was alone"
                manager.free(request)  # aborted while it waits
        else:
            request = data.draw(st.sampled_from(live))
            is_prefill = request.num_computed_tokens < request.num_tokens
            while not (
                go_on(manager, request, chunk) if is_prefill else grow(manager, request, step)
            ):
                last = live.pop()
                manager.free(last)
                if last is request:
                    break
                is_prefill = request.num_computed_tokens < request.num_tokens
        check_owners(manager, live)
    free_all(manager, live, data.draw(st.permutations(range(len(live)))), free)


def test_private_blocks_are_whole_at_the_first_chunk():
    """By hand: 200 tokens keep 100 in stage 1 and 50 in stage 2, in blocks of 16. Two requests
    share the first 160 tokens; the window of 8 leaves 192 that may be found."""
    config = LazyLLMConfig(
        prune=[{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}],
        min_prompt_tokens=100,
        score_window=8,
        revive_budget=0,
    )
    needs = needs_of(Schedule.build(config, 6))
    # Two layers and a page of hidden states in stage 0, and two layers in each of the others: pages
    # of two, so that stage 0 has two groups. The prompt's own: 50 slots of state and 100 of hidden
    # states, of forty a block.
    assert needs.stage_pages == [3, 2, 2] and needs.pages == 2
    manager = manager_of(needs, LONGEST, 400, caches=True)
    free = manager.block_pool.get_num_free_blocks()

    def counts(name: str) -> dict:
        held = manager.get_blocks(name).blocks
        groups = manager.kv_cache_config.kv_cache_groups
        names = [getattr(group.kv_cache_spec, "stage", "prompt") for group in groups]
        return {which: [len(b) for n, b in zip(names, held) if n == which] for which in names}

    first = request_of("first", DOCUMENTS[0][:160] + DOCUMENTS[1][:40])
    assert hit_of(manager, first) == 0 and admit(manager, first, 20)
    assert counts("first") == {0: [2, 2], 1: [7], 2: [4], "prompt": [4]}
    second = request_of("second", DOCUMENTS[0][:200])
    # Of the first's chunk one block is full.
    assert hit_of(manager, second) == 16
    while first.num_computed_tokens < 200:
        assert go_on(manager, first, 30)
    assert counts("first") == {0: [13, 13], 1: [7], 2: [4], "prompt": [4]}
    assert hit_of(manager, second) == 160 and admit(manager, second, 1)
    assert second.num_computed_tokens == 161
    assert counts("second") == {0: [11, 11], 1: [7], 2: [4], "prompt": [4]}
    assert manager.block_pool.get_num_free_blocks() == free - 41 - (37 - 20)
    again = request_of("again", first.prompt_token_ids)
    assert hit_of(manager, again) == 192, "twelve blocks; eight tokens are left to run"
    longer = request_of("longer", first.prompt_token_ids[:199])
    assert hit_of(manager, longer) == 176, "191 tokens need not run"
    free_all(manager, [first, second], [0, 1], free)


def test_all_stages_are_shared_where_no_prompt_is_pruned():
    """As in stock vLLM: all keys depend on what comes before a token and on nothing else."""
    schedule = Schedule.build(LazyLLMConfig(prune=[{"layer": 2, "keep": 1}]), 4)
    manager = manager_of(needs_of(schedule), LONGEST, 400, caches=True)
    first, second = (request_of(name, DOCUMENTS[0][:64]) for name in ("first", "second"))
    assert admit(manager, first) and hit_of(manager, second) == 48
    assert admit(manager, second)
    for mine, theirs in zip(*(manager.get_blocks(name).blocks for name in ("first", "second"))):
        assert mine[:3] == theirs[:3] and mine[3] is not theirs[3]
