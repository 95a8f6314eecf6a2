"""Blocks asked of vLLM's own pool, over random lives of requests: by the arithmetic, none lost, and
whatever is admitted finishes."""

import pytest
from harness.blocks import (
    BLOCK,
    PAGE,
    STATE,
    admit,
    go_on,
    grow,
    manager_of,
    needs_of,
    request_of,
    schedules,
    vectors,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm.utils.math_utils import cdiv

from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, StageSpec
from lazyllm_vllm.observe.startup_log import cache_room
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.grouping import layers_per_group
from lazyllm_vllm.plan.schedule import Schedule

chunks = st.sampled_from([1, 7, 16, 50, 1000])


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), vector=vectors, lengths=st.lists(st.integers(1, 600), max_size=8))
def test_the_most_tokens_of_pruned_prompts(schedule, vector, lengths):
    """In as many blocks as prompts have to themselves, there are at least as many tokens."""
    if not schedule.prunes:
        return
    needs = needs_of(schedule, vector)
    plans = [plan for plan in map(schedule.plan, lengths) if plan.is_pruned]
    blocks = sum(
        cdiv(needs.stage_pages[stage], needs.pages)
        * needs.stage_blocks(plan, stage, plan.num_prompt)
        for plan in plans
        for stage in range(1, schedule.num_stages)
    )
    assert sum(plan.num_prompt for plan in plans) <= needs.most_pruned_tokens(blocks)


@settings(max_examples=150, deadline=None)
@given(
    schedule=schedules(),
    vector=vectors,
    longest=st.integers(2, 600),
    caches=st.booleans(),
    chunk=chunks,
    data=st.data(),
)
def test_whatever_is_admitted_finishes(schedule, vector, longest, caches, chunk, data):
    """In the smallest cache that an engine starts with: a request of any prompt length, grown to
    any length, is preempted alone at most, and prefilled anew. Nothing else stops it, neither in
    the middle of its prompt nor because of what it left in the cache itself."""
    needs = needs_of(schedule, vector)
    least = needs.total(*2 * [needs.neediest_prompt(longest)])
    lengths = range(1, longest + 1)
    assert least == max(needs.total(n, n) for n in lengths), "of all lengths"
    with pytest.raises(ValueError, match="KV cache is needed|No available memory"):
        manager_of(needs, longest, least, caches)  # vLLM keeps one block back
    manager = manager_of(needs, longest, least + 1, caches)

    def prefill() -> None:
        assert admit(manager, request, chunk)
        while request.num_computed_tokens < request.num_tokens:
            assert go_on(manager, request, chunk)

    request = request_of("r", data.draw(st.sampled_from(lengths)))
    prefill()
    for _ in range(data.draw(st.integers(0, longest - request.num_tokens))):
        if not grow(manager, request):
            manager.free(request)
            prefill()
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == least


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), vector=vectors, num_blocks=st.integers(1, 120))
def test_the_longest_prompt_that_is_not_pruned(schedule, vector, num_blocks):
    needs = needs_of(schedule, vector)
    fits = needs.longest_unpruned(num_blocks)
    unpruned = range(1, schedule.config.min_prompt_tokens)
    assert all((needs.total(n, n) <= num_blocks) == (n <= fits) for n in unpruned)


def blocks_by_hand(spec, plan, num_prompt: int, num_total: int, num_computed: int) -> int:
    """Of a group: each stage has a slot for each token that may have keys there; what is shared
    comes as it is computed, what is private at once."""
    if isinstance(spec, StageSpec):
        if spec.prefix_cacheable:
            return cdiv(num_computed, BLOCK)
        assert plan.kept[spec.stage] <= plan.capacity[spec.stage] <= num_prompt
        return cdiv(plan.capacity[spec.stage] + num_total - num_prompt, BLOCK)
    if not plan.is_pruned:
        return 0
    vector, pages = spec.needs.vector_size, spec.needs.pages
    # Hidden states of what may be dropped behind stage 1, the only ones that are not parked.
    states = plan.capacity[1] if len(plan.capacity) > 2 else 0
    return cdiv(cdiv(num_prompt, vector // STATE) + states, PAGE // vector * pages)


@settings(max_examples=100, deadline=None)
@given(
    schedule=schedules(),
    vector=vectors,
    lives=st.lists(
        st.tuples(st.integers(1, 400), st.integers(0, 80), chunks), min_size=1, max_size=5
    ),
)
def test_blocks_follow_the_arithmetic_and_come_back(schedule, vector, lives):
    needs = needs_of(schedule, vector)
    manager = manager_of(needs, 500, 4000)
    free = manager.block_pool.get_num_free_blocks()
    requests = [request_of(f"r{i}", prompt) for i, (prompt, _, _) in enumerate(lives)]

    def check(request, num_prompt) -> None:
        plan = schedule.plan(num_prompt)
        held = manager.get_blocks(request.request_id).blocks
        for group, blocks in zip(manager.kv_cache_config.kv_cache_groups, held):
            counts = num_prompt, request.num_tokens, request.num_computed_tokens
            assert len(blocks) == blocks_by_hand(group.kv_cache_spec, plan, *counts)

    for request, (num_prompt, decoded, chunk) in zip(requests, lives):
        assert admit(manager, request, chunk)
        check(request, num_prompt)
        while request.num_computed_tokens < num_prompt:
            assert go_on(manager, request, chunk)
            check(request, num_prompt)
        for _ in range(decoded):
            assert grow(manager, request)
        if len(requests) % 2:  # preempted: prefilled anew, prompt and output as one prompt
            manager.free(request)
            num_prompt = request.num_tokens
            assert admit(manager, request)
        check(request, num_prompt)
        assert needs.total(num_prompt, request.num_tokens) == sum(
            map(len, manager.get_blocks(request.request_id).blocks)
        )
    for request in requests:
        manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free
    for each in manager.coordinator.single_type_managers:
        assert not each.req_to_blocks and not getattr(each, "plans", None)


def test_a_request_is_planned_once_for_all_its_private_groups():
    config = LazyLLMConfig(prune=({"layer": 2, "keep": 0.5},), min_prompt_tokens=10)
    needs = needs_of(Schedule.build(config, 4))
    # Stage 0 has two layers and a page of hidden states: as large as stage 1 but for half of it.
    assert needs.stage_pages == [3, 2] and needs.pages == 2
    manager = manager_of(needs, 500, 200)
    request = request_of("r", 100)
    assert admit(manager, request, 10)
    shared, private = [], []
    for each in manager.coordinator.single_type_managers:
        (shared if each.kv_cache_spec.prefix_cacheable else private).append(each)
    assert [each.kv_cache_spec.stage for each in shared] == [0, 0]
    plans = [each.plans["r"] for each in private]
    assert len(plans) == 2 and plans[0] is plans[1]
    assert plans[0] == Schedule.build(config, 4).plan(100), "of all tokens, not of a chunk's"


@pytest.mark.parametrize("vector", (100, 250))
@pytest.mark.parametrize(
    "starts",
    [
        (0, 8, 16, 24, 32),
        (0, 5, 10, 22, 32),
        (0, 11, 21, 32),
        (0, 4, 16, 32),
        (0, 5, 12),
        (0, 6, 16, 32),
        (0, 11, 20, 30),
        (0, 1, 2, 9),
        (0, 4),
    ],
)
def test_groups_are_as_large_as_we_say(starts, vector):
    """``layers_per_group`` is vLLM's rule, no group mixes stages, and hidden states are parked in
    the groups of stage 0 as if they were layers."""
    prune = tuple({"layer": s, "keep": 0.5} for s in starts[1:-1])
    schedule = Schedule.build(LazyLLMConfig(prune=prune), starts[-1])
    needs = needs_of(schedule, vector)
    parked = cdiv(BLOCK * vector, PAGE) if prune else 0
    assert needs.parked_pages == parked == (0 if not prune else 1 if vector == 100 else 2)
    size = layers_per_group([schedule.stage_sizes[0] + parked, *schedule.stage_sizes[1:]])
    assert needs.pages == size
    manager = manager_of(needs, 500, 2000)
    groups = manager.kv_cache_config.kv_cache_groups
    assert max(len(g.layer_names) for g in groups) == size
    stages = [g.kv_cache_spec.stage for g in groups if isinstance(g.kv_cache_spec, StageSpec)]
    assert sorted(set(stages)) == list(range(schedule.num_stages))
    num_parked = 0
    for g in groups:
        if isinstance(g.kv_cache_spec, StageSpec):
            kinds = [name.split(".") for name in g.layer_names]
            layers = [int(number) for kind, number in kinds if kind == "layers"]
            num_parked += len(kinds) - len(layers)
            is_first = {0} if len(kinds) > len(layers) else set()
            assert {schedule.stage_of(i) for i in layers} | is_first == {g.kv_cache_spec.stage}
    assert num_parked == parked
    prompts = [g for g in groups if isinstance(g.kv_cache_spec, PromptSpec)]
    assert len(prompts) == int(schedule.prunes)


def test_the_log_counts_what_stock_vllm_keeps_of_windows():
    """Of 100 blocks a layer, three layers with windows of ten blocks keep ten each."""
    needs = needs_of(Schedule.build(LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}]), 4))
    longest, blocks = 100 * BLOCK, 10_000
    _, whole = cache_room(needs, blocks, longest, [])
    _, windowed = cache_room(needs, blocks, longest, [10 * BLOCK] * 3)
    assert windowed == pytest.approx(whole * 400 / 130, rel=1e-3)
