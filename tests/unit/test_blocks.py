"""Blocks asked of vLLM's own pool, over random lives of requests: by the arithmetic, none lost, and
whatever is admitted finishes."""

import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from harness.tiny import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm import EngineArgs, SamplingParams
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.specs import PromptSpec, StageSpec
from lazyllm_vllm.observe.startup_log import cache_room
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.grouping import layers_per_group
from lazyllm_vllm.plan.schedule import Schedule

try:  # vLLM 0.33 asks for the groups first
    from vllm.v1.core.kv_cache_planning import get_global_kv_cache_groups, get_kv_cache_configs
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_configs

    get_global_kv_cache_groups = None

BLOCK = 16
HEADS, SIZE = 2, 8
PAGE = BLOCK * HEADS * SIZE * 2 * 4
VECTOR = 100  # twenty of them fill a page, and leave some of it


def needs_of(schedule: Schedule) -> BlockNeeds:
    return BlockNeeds(schedule, BLOCK, PAGE, VECTOR)


def specs_of(needs: BlockNeeds) -> dict:
    """As an engine's layers give them."""
    schedule = needs.schedule
    specs = {
        f"layers.{i}": StageSpec(
            block_size=BLOCK,
            num_kv_heads=HEADS,
            head_size=SIZE,
            dtype=torch.float32,
            stage=schedule.stage_of(i),
            needs=needs,
        )
        for i in range(schedule.num_layers)
    }
    assert specs["layers.0"].page_size_bytes == PAGE
    if schedule.prunes:
        prompt = PromptSpec(block_size=BLOCK, needs=needs)
        specs |= {f"prompt.{i}": prompt for i in range(needs.pages)}
    return specs


@cache
def stock_config():
    with tempfile.TemporaryDirectory() as folder:
        args = EngineArgs(
            model=str(tiny_model(Path(folder))), skip_tokenizer_init=True, dtype="float32"
        )
        config = args.create_engine_config()
    config.cache_config.kv_cache_layout = "LBNHC"  # as the engine core resolves it
    return config


def manager_of(needs: BlockNeeds, longest: int, num_blocks: int) -> KVCacheManager:
    """vLLM's own, for a cache of so many blocks. Raises ValueError as an engine's start does."""
    vllm_config = stock_config()
    vllm_config.model_config.max_model_len = longest
    memory = num_blocks * needs.pages * PAGE
    specs = [specs_of(needs)]
    groups = [get_global_kv_cache_groups(vllm_config, specs)] if get_global_kv_cache_groups else []
    (config,) = get_kv_cache_configs(vllm_config, specs, [memory], *groups)
    assert config.num_blocks == num_blocks
    return KVCacheManager(
        config, longest, scheduler_block_size=BLOCK, hash_block_size=BLOCK, enable_caching=False
    )


def request_of(name: str, num_prompt: int) -> Request:
    params = SamplingParams(max_tokens=10**6)
    return Request(
        name, prompt_token_ids=[1] * num_prompt, sampling_params=params, pooling_params=None
    )


def admit(manager: KVCacheManager, request: Request) -> bool:
    """As the scheduler does with a waiting request that runs alone."""
    request.num_computed_tokens = 0
    blocks = manager.allocate_slots(
        request, request.num_tokens, full_sequence_must_fit=True, has_scheduled_reqs=False
    )
    request.num_computed_tokens = request.num_tokens
    return blocks is not None


def grow(manager: KVCacheManager, request: Request) -> bool:
    """One more token, as the scheduler does with a running request."""
    request.append_output_token_ids(1)
    grown = manager.allocate_slots(request, 1) is not None
    request.num_computed_tokens = request.num_tokens
    return grown


@st.composite
def schedules(draw) -> Schedule:
    num_layers = draw(st.integers(2, 12))
    cuts = draw(st.lists(st.integers(1, num_layers - 1), max_size=3, unique=True).map(sorted))
    keeps = draw(st.lists(st.integers(1, 100), min_size=3, max_size=3).map(sorted))[::-1]
    config = LazyLLMConfig(
        prune=tuple({"layer": n, "keep": k / 100} for n, k in zip(cuts, keeps)),
        min_prompt_tokens=draw(st.integers(1, 500)),
        first_tokens=draw(st.integers(0, 20)),
        last_tokens=draw(st.integers(1, 80)),
        score_window=1,
        revive_budget=draw(st.sampled_from([64, 0])),
        revive_reserve=draw(st.sampled_from([0.1, 0, 1, 0.5])),
    )
    return Schedule.build(config, num_layers)


@settings(max_examples=150, deadline=None)
@given(schedule=schedules(), longest=st.integers(2, 600), data=st.data())
def test_whatever_is_admitted_finishes(schedule, longest, data):
    """In the smallest cache that an engine starts with: a request of any prompt length, grown to
    any length, is preempted alone at most, and prefilled anew."""
    needs = needs_of(schedule)
    least = needs.total(*2 * [needs.neediest_prompt(longest)])
    lengths = range(1, longest + 1)
    assert least == max(needs.total(n, n) for n in lengths), "of all lengths"
    with pytest.raises(ValueError, match="KV cache is needed|No available memory"):
        manager_of(needs, longest, least)  # vLLM keeps one block back
    manager = manager_of(needs, longest, least + 1)

    request = request_of("r", data.draw(st.sampled_from(lengths)))
    assert admit(manager, request)
    for _ in range(data.draw(st.integers(0, longest - request.num_tokens))):
        if not grow(manager, request):
            manager.free(request)
            assert admit(manager, request)
    manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == least


@settings(max_examples=100, deadline=None)
@given(schedule=schedules(), num_blocks=st.integers(1, 120))
def test_the_longest_prompt_that_is_not_pruned(schedule, num_blocks):
    needs = needs_of(schedule)
    fits = needs.longest_unpruned(num_blocks)
    unpruned = range(1, schedule.config.min_prompt_tokens)
    assert all((needs.total(n, n) <= num_blocks) == (n <= fits) for n in unpruned)


@settings(max_examples=100, deadline=None)
@given(
    schedule=schedules(),
    lives=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 80)), min_size=1, max_size=5),
)
def test_blocks_follow_the_arithmetic_and_come_back(schedule, lives):
    """By hand: each stage has a slot for each token that may have keys there."""
    needs = needs_of(schedule)
    manager = manager_of(needs, 500, 2500)
    free = manager.block_pool.get_num_free_blocks()
    requests = [request_of(f"r{i}", prompt) for i, (prompt, _) in enumerate(lives)]
    for request, (_, decoded) in zip(requests, lives):
        assert admit(manager, request)
        for _ in range(decoded):
            assert grow(manager, request)
        if len(requests) % 2:  # preempted: prefilled anew, prompt and output as one prompt
            manager.free(request)
            assert admit(manager, request)
        num_prompt = request.num_tokens if len(requests) % 2 else request.num_prompt_tokens
        plan = schedule.plan(num_prompt)
        held = manager.get_blocks(request.request_id).blocks
        for group, blocks in zip(manager.kv_cache_config.kv_cache_groups, held):
            spec = group.kv_cache_spec
            if isinstance(spec, StageSpec):
                most = plan.capacity[spec.stage] + request.num_tokens - num_prompt
                assert len(blocks) == cdiv(most, BLOCK)
                assert plan.kept[spec.stage] <= plan.capacity[spec.stage] <= num_prompt
                continue
            slots = cdiv(num_prompt, VECTOR // 20) + (num_prompt if schedule.has_aux else 0)
            assert len(blocks) == (cdiv(slots, 20 * needs.pages) if plan.is_pruned else 0)
    for request in requests:
        manager.free(request)
    assert manager.block_pool.get_num_free_blocks() == free
    for each in manager.coordinator.single_type_managers:
        assert not each.plans and not each.req_to_blocks


def test_a_request_is_planned_once_for_all_groups():
    config = LazyLLMConfig(prune=({"layer": 2, "keep": 0.5},), min_prompt_tokens=10)
    manager = manager_of(needs_of(Schedule.build(config, 4)), 500, 200)
    request = request_of("r", 100)
    assert admit(manager, request)
    plans = [each.plans["r"] for each in manager.coordinator.single_type_managers]
    assert len(plans) == 3 and all(plan is plans[0] for plan in plans)
    assert plans[0] == Schedule.build(config, 4).plan(100)


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
def test_groups_are_as_large_as_we_say(starts):
    """``layers_per_group`` is vLLM's rule, and no group mixes stages."""
    prune = tuple({"layer": s, "keep": 0.5} for s in starts[1:-1])
    schedule = Schedule.build(LazyLLMConfig(prune=prune), starts[-1])
    size = layers_per_group(schedule.stage_sizes)
    manager = manager_of(needs_of(schedule), 500, 2000)
    groups = manager.kv_cache_config.kv_cache_groups
    assert max(len(g.layer_names) for g in groups) == size
    stages = [g.kv_cache_spec.stage for g in groups if isinstance(g.kv_cache_spec, StageSpec)]
    assert sorted(set(stages)) == list(range(schedule.num_stages))
    for g in groups:
        if isinstance(g.kv_cache_spec, StageSpec):
            layers = [int(name.split(".")[1]) for name in g.layer_names]
            assert {schedule.stage_of(i) for i in layers} == {g.kv_cache_spec.stage}
    prompts = [g for g in groups if isinstance(g.kv_cache_spec, PromptSpec)]
    assert len(prompts) == int(schedule.prunes)


def test_the_log_counts_what_stock_vllm_keeps_of_windows():
    """Of 100 blocks a layer, three layers with windows of ten blocks keep ten each."""
    needs = needs_of(Schedule.build(LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}]), 4))
    longest, blocks = 100 * BLOCK, 10_000
    _, whole = cache_room(needs, blocks, longest, [])
    _, windowed = cache_room(needs, blocks, longest, [10 * BLOCK] * 3)
    assert windowed == pytest.approx(whole * 400 / 130, rel=1e-3)
