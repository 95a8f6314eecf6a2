"""What must hold between any two steps of an engine. Each function raises AssertionError."""

from weakref import WeakKeyDictionary

from harness import block_sets
from harness.engine import _core, _runner, _state, block_contents

from lazyllm_vllm.hooks.kv_cache.managers import PlannedManager

# What the shared blocks of each engine held when it was last checked.
_CONTENTS: WeakKeyDictionary = WeakKeyDictionary()


def check(llm) -> None:
    """All of them."""
    blocks_add_up(llm)
    shared_blocks_stay(llm)
    scheduler_forgets(llm)
    worker_forgets(llm)


def _managers(llm) -> tuple:
    return _core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers


def blocks_add_up(llm) -> None:
    """See ``harness.block_sets``."""
    scheduler = _core(llm).scheduler
    others = [block for _, blocks in scheduler.deferred_frees for block in blocks]
    others += getattr(scheduler.kv_cache_manager.block_pool, "held_by_test", ())
    block_sets.blocks_add_up(scheduler.kv_cache_manager, others)


def shared_blocks_stay(llm) -> None:
    """What is in full blocks is never written again, while anybody may read it."""
    if getattr(_state(llm), "copier", None) is None:  # nothing is ever pruned
        return
    known = _CONTENTS.setdefault(llm, {})
    sets = block_sets.shared_sets(_core(llm).scheduler.kv_cache_manager)
    now = {each: block_contents(llm, block_sets.ids(each.blocks)) for each in sets}
    for each, content in now.items():
        assert content == known.get(each, content), "a shared block was written"
    _CONTENTS[llm] = now


def scheduler_forgets(llm) -> None:
    """The block managers know requests that there are, and no others."""
    scheduler = _core(llm).scheduler
    there = scheduler.requests.keys()
    running = {request.request_id for request in scheduler.running}
    for manager in _managers(llm):
        assert {name for name, of_one in manager.req_to_blocks.items() if of_one} <= running
        assert manager.num_cached_block.keys() <= there, "cached blocks of a request that left"
        if isinstance(manager, PlannedManager):
            assert manager.plans.keys() <= there, "the plan of a request that left"
            assert manager.settings.keys() <= there, "the setting of a request that left"
            assert manager.enough_for.keys() <= running, "room of a request that left"
            assert manager.found.keys() <= there, "what a request found that left"
            for name in manager.ran:
                assert name in running, "rows of a request that left"
                left = manager.plans[name].num_prompt - scheduler.requests[name].num_computed_tokens
                assert left == 1, "what is held back has its last token to come"
            assert running <= manager.plans.keys(), "a request runs without a plan"


def worker_forgets(llm) -> None:
    """The worker knows requests that run, and those that it is to be told have left; of each it has
    the blocks that the scheduler gave."""
    scheduler, runner, state = _core(llm).scheduler, _runner(llm), _state(llm)
    of_vllm = runner.req_states.req_id_to_index
    assert state.index_of == of_vllm, "the request table and vLLM's differ"
    known = state.index_of.keys()
    leaving = scheduler.finished_req_ids | scheduler.reset_preempted_req_ids
    running = {request.request_id for request in scheduler.running}
    assert known <= running | leaving, f"{known - running - leaving} left, and the worker has them"
    assert state.plans.keys() == state.caught_up.keys() == known
    assert state.selecting.keys() <= known and state.wants_prompt <= known
    blocks = sum(state.needs.prompt_blocks(plan) for plan in state.plans.values())
    assert state.stats.aux_blocks == blocks, "blocks of the Aux Cache are miscounted"
    for name in known & running - leaving:
        for manager, table in zip(_managers(llm), runner.block_tables.block_tables):
            given = [block.block_id for block in manager.req_to_blocks[name]]
            has = table.gpu[state.index_of[name], : len(given)].tolist()
            assert has == given, f"{name} has blocks {has}, and was given {given}"


def nothing_is_left(llm) -> None:
    """For an engine that has nothing to do, and has taken the step in which it learns so. vLLM's
    own front end forgets no parent of several answers that was aborted (``parent_requests``)."""
    check(llm)
    engine, scheduler, state = llm.llm_engine, _core(llm).scheduler, _state(llm)
    output = engine.output_processor
    left = {
        "requests": scheduler.requests,
        "waiting": list(scheduler.waiting),
        "running": scheduler.running,
        "finished": scheduler.finished_req_ids,
        "worker": state.index_of,
        "front end": output.request_states,
        "external ids": output.external_req_ids,
        "copies": state.stats._copies,
    }
    for manager in _managers(llm):
        left |= {"blocks": manager.req_to_blocks, "cached": manager.num_cached_block}
        if isinstance(manager, PlannedManager):
            left |= {"plans": manager.plans, "settings": manager.settings}
            left |= {"goes on": manager.snapshots.taken, "enough for": manager.enough_for}
            left |= {"own": manager.snapshots.preempted, "held back": manager.ran}
            left |= {"found": manager.found}
        assert not (there := {what: one for what, one in left.items() if one}), there
    pool = scheduler.kv_cache_manager.block_pool
    held = len(getattr(pool, "held_by_test", ())) + 1
    assert pool.get_num_free_blocks() + held == len(pool.blocks), "blocks are lost"
