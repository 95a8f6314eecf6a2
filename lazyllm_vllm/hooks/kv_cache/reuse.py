"""What a request finds of others' work, and what it leaves: called with every request that asks for
blocks, and with every one that gives its blocks back."""

from collections.abc import Callable
from dataclasses import replace

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.managers import PlannedManager, PromptManager
from lazyllm_vllm.hooks.kv_cache.snapshots import Snapshot
from lazyllm_vllm.plan.request_setting import DEEP, DEFAULT, OFF, RequestSetting

CONTINUATION = "lazyllm_continuation"  # where workers find it in a request's data


def find_blocks(lookup: Callable[[], tuple], manager: KVCacheManager, request: Request) -> tuple:
    """What vLLM's ``get_computed_blocks`` finds for a request, less what the request does not
    want, or more: a snapshot to go on from.

    Args:
        lookup: vLLM's own, for this request.
    """
    planned = _planned(manager)
    if not planned:
        return lookup()
    schedule, snapshots = planned[0].kv_cache_spec.needs.schedule, planned[0].snapshots
    setting = _note_setting(planned[0], request)
    reuse = schedule.reuse(setting)
    snapshots.taken.pop(request.request_id, None)
    if reuse == OFF and schedule.plan(request.num_tokens, setting).is_pruned:
        request.skip_reading_prefix_cache = True
    found = lookup()
    if reuse != DEEP or not found[1]:
        return found
    snapshot = snapshots.find(request, planned[0].block_size, replace(setting, reuse=None))
    return found if snapshot is None else _go_on(manager, request, snapshot, found)


def _go_on(manager: KVCacheManager, request: Request, snapshot: Snapshot, found: tuple) -> tuple:
    """Have a request go on from a snapshot, if there is room for it and the snapshot; else it is
    pruned anew, which needs less."""
    blocks, hit, *others = found
    planned = _planned(manager)[0]
    # Of tokens after the snapshot's nothing is found: they run in the later stages.
    hit = min(hit, snapshot.num_tokens // planned.block_size * planned.block_size)
    blocks = manager.truncate_computed_blocks(blocks, hit)
    taken = planned.snapshots.taken
    taken[request.request_id] = snapshot
    needed = manager.coordinator.get_num_blocks_to_allocate(
        request_id=request.request_id,
        num_tokens=request.num_tokens,
        new_computed_blocks=blocks.blocks,
        num_encoder_tokens=0,
        total_computed_tokens=hit,
        num_local_computed_tokens=hit,
        num_tokens_main_model=request.num_tokens,
        apply_admission_cap=True,
    )
    if needed + manager.watermark_blocks > manager.block_pool.get_num_free_blocks():
        del taken[request.request_id]
        return found
    return blocks, hit, *others


def leave(manager: KVCacheManager, request: Request) -> None:
    """Keep what a request has behind stage 0 as a snapshot, if others may go on from it. Called
    before its blocks are freed."""
    planned = _planned(manager)
    plan = planned[0].plans.get(request.request_id) if planned else None
    if plan is None or not plan.is_pruned or not manager.enable_caching:
        return
    schedule, snapshots = planned[0].kv_cache_spec.needs.schedule, planned[0].snapshots
    setting = planned[0].settings.get(request.request_id, DEFAULT)
    # Steps that were scheduled run, though nobody waits for them.
    num_tokens, block_size = request.num_computed_tokens, planned[0].block_size
    taken = snapshots.taken.get(request.request_id)
    least = plan.num_prompt if taken is None else taken.num_tokens
    if schedule.reuse(setting) != DEEP or not least <= num_tokens <= request.num_tokens:
        return
    full_blocks = num_tokens // block_size
    if not full_blocks:
        return
    blocks = {m.kv_cache_group_id: m.give_up(request.request_id, num_tokens) for m in planned}
    prompt_group = next(m.kv_cache_group_id for m in planned if isinstance(m, PromptManager))
    snapshot = Snapshot(
        plan=plan,
        setting=replace(setting, reuse=None),
        num_tokens=num_tokens,
        last_hash=request.block_hashes[full_blocks - 1],
        tail=request.all_token_ids[full_blocks * block_size : num_tokens],
        blocks=blocks,
        prompt_block=blocks[prompt_group][0],
    )
    snapshots.keep(snapshot, manager.block_pool)


def hand_over(manager: KVCacheManager, new_requests: list[NewRequestData]) -> None:
    """Tell workers, in the data of requests that were just scheduled for the first time, where
    those that go on do so."""
    planned = _planned(manager)
    if not planned or not planned[0].snapshots.copies:
        return
    for data in new_requests:
        continuation = planned[0].snapshots.hand_over(data.req_id, manager.block_pool)
        if continuation is not None:
            setattr(data, CONTINUATION, continuation)


def _planned(manager: KVCacheManager) -> list[PlannedManager]:
    """Those of the groups that are private to a request; none: nothing is pruned."""
    return [m for m in manager.coordinator.single_type_managers if isinstance(m, PlannedManager)]


def _note_setting(planned: PlannedManager, request: Request) -> RequestSetting:
    params = request.sampling_params
    setting = planned.kv_cache_spec.needs.schedule.setting(params and params.extra_args)
    planned.settings[request.request_id] = setting
    return setting
