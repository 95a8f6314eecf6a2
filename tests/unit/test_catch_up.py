"""Cached prompts that are not pruned: how many tokens the steps have in which they catch up."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from vllm.v1.core.kv_cache_manager import KVCacheBlocks

from lazyllm_vllm.hooks.kv_cache.catch_up import begin_unpruned, catch_up_chunk
from lazyllm_vllm.runtime.prefill_rows import Prefills

BLOCK = 64


def manager_of() -> SimpleNamespace:
    """What is read and written of a block manager."""
    return SimpleNamespace(found={}, block_size=BLOCK)


def request_of(num_tokens: int):
    return SimpleNamespace(request_id="r", num_tokens=num_tokens)


def found_of(hit: int, whole: int) -> tuple:
    """A group of the first stage, one of a later stage, and one of which nothing is shared."""
    return KVCacheBlocks((list(range(hit // BLOCK)), list(range(whole // BLOCK)), [])), hit, 0


@given(
    num_tokens=st.integers(2, 131072),
    new=st.integers(1, 131072),
    behind=st.integers(0, 131072),
    budget=st.sampled_from((2048, 8192, 16384)),
)
def test_no_step_catches_up_with_more_than_it_has_tokens(num_tokens, new, behind, budget):
    manager, request = manager_of(), request_of(num_tokens)
    found = max(num_tokens - new, 0) // BLOCK * BLOCK
    whole = max(found - behind, 0) // BLOCK * BLOCK
    blocks, hit, _ = begin_unpruned(manager, request, found_of(found, whole), whole)
    assert found - BLOCK <= hit <= found
    assert blocks.blocks == found_of(hit, min(whole, hit))[0].blocks
    first, caught_up = hit, min(whole, hit)
    assert manager.found["r"] == (first, caught_up, caught_up < first)
    while first < num_tokens:
        size = min(budget, num_tokens - first)
        chunk = catch_up_chunk(manager, request, size, budget)
        assert 0 < chunk <= size and (chunk == size or hit - whole > budget)
        end = first + chunk
        arrays = (np.array([at], np.int32) for at in (first, end, caught_up))
        step = dict(zip(("first", "end", "caught_up"), arrays))
        (later_end,) = replace(Prefills.whole([num_tokens], 3), **step).later_end(budget).tolist()
        assert later_end - caught_up <= budget + chunk
        # What may be shared has run.
        assert manager.found["r"].is_behind or later_end == end
        first, caught_up = end, later_end
    assert caught_up == num_tokens


def test_who_does_not_catch_up_is_left_alone():
    """Prompts whose later stages' keys were found, too, and those that are pruned."""
    manager, request = manager_of(), request_of(100_001)
    found = found_of(99_968, 99_968)
    assert begin_unpruned(manager, request, found, 99_968) is found
    assert catch_up_chunk(manager, request, 33, 8192) == 33
    manager.found.clear()
    assert catch_up_chunk(manager, request, 33, 8192) == 33
