"""Cached prompts that are not pruned: how many tokens the steps have in which they catch up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from lazyllm_vllm.hooks.kv_cache.catch_up import catch_up_chunk, leave_tokens
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.prefill_rows import Prefills

BLOCK = 64


def scheduler_of(config: dict, extra_args: dict | None = None):
    """What is read of a block manager, which knows of request "r"."""
    schedule = Schedule.build(parse_config(config), 32)
    return SimpleNamespace(
        hits={},
        settings={"r": schedule.setting(extra_args)},
        block_size=BLOCK,
        kv_cache_spec=SimpleNamespace(needs=SimpleNamespace(schedule=schedule)),
    )


def request_of(num_tokens: int):
    return SimpleNamespace(request_id="r", num_tokens=num_tokens)


def found_of(hit: int) -> tuple:
    return KVCacheBlocks((list(range(hit // BLOCK)), [])), hit, 0


@given(
    num_tokens=st.integers(2, 131072),
    new=st.integers(1, 131072),
    budget=st.sampled_from((2048, 8192, 16384)),
)
def test_no_step_catches_up_with_more_than_it_has_tokens(num_tokens, new, budget):
    manager, request = scheduler_of({}, {"lazyllm": "off"}), request_of(num_tokens)
    found = max(num_tokens - new, 0) // BLOCK * BLOCK
    blocks, hit, _ = leave_tokens(manager, request, found_of(found))
    assert found - BLOCK <= hit <= found and blocks.blocks == (list(range(hit // BLOCK)), [])
    first, caught_up = hit, 0
    while first < num_tokens:
        size = min(budget, num_tokens - first)
        chunk = catch_up_chunk(manager, request, size, budget)
        assert 0 < chunk <= size and (chunk == size or hit > budget)
        end = first + chunk
        arrays = (np.array([at], np.int32) for at in (first, end, caught_up))
        step = dict(zip(("first", "end", "caught_up"), arrays))
        (later_end,) = replace(Prefills.whole([num_tokens], 3), **step).later_end(budget).tolist()
        assert later_end - caught_up <= budget + chunk
        first, caught_up = end, later_end
    assert caught_up == num_tokens


def test_who_does_not_catch_up_is_left_alone():
    """Prompts that are pruned, and all where nothing is ever dropped."""
    for config in ({}, {"prune": []}):
        manager, request = scheduler_of(config), request_of(100_001)
        found = found_of(99_968)
        assert leave_tokens(manager, request, found) is found
        assert catch_up_chunk(manager, request, 33, 8192) == 33
