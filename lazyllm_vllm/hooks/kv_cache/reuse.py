"""What a request finds of others' work, and what it leaves: called with every request that asks for
blocks, and with every one that gives its blocks back."""

from collections.abc import Callable
from dataclasses import replace

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.catch_up import catch_up_chunk, cut, leave_tokens
from lazyllm_vllm.hooks.kv_cache.managers import (
    PlannedManager,
    PromptManager,
    planned_managers,
)
from lazyllm_vllm.hooks.kv_cache.snapshots import BlockSet, Snapshot, Taken
from lazyllm_vllm.hooks.turns import PLACES
from lazyllm_vllm.plan.request_setting import DEEP, DEFAULT, OFF, RequestSetting
from lazyllm_vllm.plan.schedule import TURNS_A_STEP, Schedule

CONTINUATION = "lazyllm_continuation"  # where workers find it in a request's data


def find_blocks(lookup: Callable[[], tuple], manager: KVCacheManager, request: Request) -> tuple:
    """What vLLM's ``get_computed_blocks`` finds for a request, less what the request does not
    want, or more: a snapshot to go on from.

    Args:
        lookup: vLLM's own, for this request.
    """
    planned = planned_managers(manager)
    if not planned:
        return lookup()
    schedule, snapshots = planned[0].kv_cache_spec.needs.schedule, planned[0].snapshots
    setting = _note_setting(planned[0], request)
    plan = planned[0].plans.get(request.request_id)
    planned[0].watchdog.asks(manager.block_pool, request, plan)
    reuse = schedule.reuse(setting)
    snapshots.taken.pop(request.request_id, None)
    if reuse == OFF and schedule.plan(request.num_tokens, setting).is_pruned:
        request.skip_reading_prefix_cache = True
    found = leave_tokens(planned[0], request, lookup())
    snapshot, ways = snapshots.own(request), (True,)
    if snapshot is None and reuse == DEEP:
        wanted = replace(setting, reuse=None)
        snapshot = snapshots.find(request, planned[0].block_size, wanted)
        if snapshot is None or not _pays(schedule, snapshot, request, setting):
            return found
        # What others read now, more will want to go on from.
        ways = (False,) if snapshot.is_read else (False, True)
    if snapshot is None:
        return found
    return _go_on(manager, request, snapshot, found, ways) or found


def _pays(
    schedule: Schedule, snapshot: Snapshot, request: Request, setting: RequestSetting
) -> bool:
    """Whether a request goes on from a snapshot, rather than being pruned anew."""
    anew = schedule.plan(request.num_tokens, setting)
    has_room = schedule.has_room(snapshot.plan, snapshot.turns)
    return has_room and schedule.goes_on_sooner(snapshot.num_tokens, anew)


def _go_on(
    manager: KVCacheManager, request: Request, snapshot: Snapshot, found: tuple, ways: tuple
) -> tuple | None:
    """Have a request go on from a snapshot. None: there is no room, and it is pruned anew, which
    needs less.

    Args:
        found: as ``find_blocks`` returns it.
        ways: of ``Taken.adopts``, the first that there is room for.
    """
    planned, pool = planned_managers(manager)[0], manager.block_pool
    # Tokens after the snapshot's run in all stages.
    full_blocks = min(found[1], snapshot.num_tokens) // planned.block_size
    found = cut(found, full_blocks, planned.block_size)
    blocks, hit, *_ = found
    for adopts in ways:
        planned.snapshots.taken[request.request_id] = Taken(snapshot, adopts)
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
        if needed + manager.watermark_blocks <= pool.get_num_free_blocks():
            return found
    del planned.snapshots.taken[request.request_id]
    return None


def chunk_size(scheduler: Scheduler, request: Request, first: int, size: int) -> int:
    """Tokens of a prefill's chunk, from position ``first`` on, if vLLM would give it ``size``.
    0: it waits for a step that has more room.

    A request that goes on, if its last token is to select, takes up to three places in the batch
    (``hooks.turns``), and ``TURNS_A_STEP`` of them have rows for what they revive. Where not even
    one finds places, that token is left to a step of its own. The tokens that see what it revives
    come with it: a chunk before leaves them all. For others see ``catch_up``.
    """
    if size == 1:  # as in every decode step
        return size
    planned = planned_managers(scheduler.kv_cache_manager)
    if not planned:
        return size
    taken = planned[0].snapshots.taken.get(request.request_id)
    if taken is None:
        budget = scheduler.scheduler_config.max_num_batched_tokens
        return catch_up_chunk(planned[0], request, size, budget)
    snapshots, schedule = planned[0].snapshots, planned[0].kv_cache_spec.needs.schedule
    if not schedule.selects(taken.snapshot.plan):
        return size
    window = schedule.config.score_window
    if left := request.num_tokens - first - size:
        cut = size - max(window - left, 0)
        return cut if cut > 0 else _later(scheduler, window, size)
    queues = scheduler.running, scheduler.waiting, scheduler.kv_holding_waiting
    room = scheduler.max_num_running_reqs - 1 - sum(map(len, queues))
    if snapshots.turns < TURNS_A_STEP and (PLACES - 1) * (snapshots.turns + 1) <= room:
        snapshots.turns += 1
        return size
    return _later(scheduler, window, size - 1) if snapshots.turns else size - 1


def _later(scheduler: Scheduler, window: int, size: int) -> int:
    """0, unless no step may ever give a chunk so many tokens as ``window``: then ``size``."""
    chunk = scheduler.scheduler_config.long_prefill_token_threshold
    most = scheduler.max_num_scheduled_tokens - scheduler.max_num_running_reqs
    return size if most < window or 0 < chunk < window else 0


def free(release: Callable[[], None], manager: KVCacheManager, request: Request) -> None:
    """Free a request's blocks, but keep what it has behind stage 0 as a snapshot: for others, or,
    if it was preempted, for itself. A snapshot's blocks are to be handed out after the request's
    others, since it is lost with one of them.

    Args:
        release: vLLM's own, for this request.
    """
    planned = planned_managers(manager)
    if not planned:
        return release()
    snapshots, pool, name = planned[0].snapshots, manager.block_pool, request.request_id
    is_held, taken = planned[0].req_to_blocks.get(name), snapshots.taken.get(name)
    shared = taken.snapshot.full if is_held and taken else ()
    snapshot = _snapshot_of(planned, request, shared) if is_held else None
    if snapshot is None and shared:
        for each in planned:
            each.drop(name, len(taken.snapshot.full_of(each.kv_cache_group_id)))
    release()
    if request.is_finished():
        snapshots.forget_own(name)
    if snapshot is not None:
        snapshots.keep(snapshot, pool)
    else:
        snapshots.release(shared[::-1], pool)


def _snapshot_of(
    planned: list[PlannedManager], request: Request, shared: tuple[BlockSet, ...]
) -> Snapshot | None:
    """What there is of a request behind stage 0, whose blocks are its own no more. None: nothing
    that somebody may go on from.

    Args:
        shared: full blocks that it took with the snapshot that it went on from.
    """
    first, name = planned[0], request.request_id
    plan, taken = first.plans.get(name), first.snapshots.taken.get(name)
    if plan is None or not plan.is_pruned:
        return None
    # Steps that were scheduled run, though nobody waits for them.
    num_tokens = request.num_computed_tokens
    if num_tokens < (taken.snapshot.num_tokens if taken else plan.num_prompt):
        return None
    setting = first.settings.get(name, DEFAULT)
    full_blocks = num_tokens // first.block_size
    if request.is_finished():
        shares = first.kv_cache_spec.needs.schedule.reuse(setting) == DEEP
        is_known = num_tokens <= request.num_tokens and 0 < full_blocks <= len(request.block_hashes)
        if not (shares and is_known):
            return None
        name = request.block_hashes[full_blocks - 1]
    full, rest = BlockSet({}), BlockSet({})
    for each in planned:
        group = each.kv_cache_group_id
        num_shared = sum(len(taken.by_group[group]) for taken in shared)
        given = each.give_up(request.request_id, num_tokens, num_shared)
        full.by_group[group], rest.by_group[group] = given
    prompt_group = next(m.kv_cache_group_id for m in planned if isinstance(m, PromptManager))
    return Snapshot(
        name=name,
        plan=plan,
        setting=replace(setting, reuse=None),
        num_tokens=num_tokens,
        # One that was preempted goes on with its own turn.
        turns=taken.snapshot.turns + (taken.snapshot.name != request.request_id) if taken else 0,
        tail=request.all_token_ids[full_blocks * first.block_size : num_tokens],
        full=(*shared, full) if full.blocks else shared,
        rest=rest,
        prompt_block=rest.by_group[prompt_group][0].block_id,
    )


def hand_over(manager: KVCacheManager, new_requests: list[NewRequestData]) -> None:
    """Tell workers, in the data of requests that were just scheduled for the first time, where
    those that go on do so."""
    planned = planned_managers(manager)
    if not planned:
        return
    planned[0].snapshots.turns = 0
    if not planned[0].snapshots.taken:
        return
    for data in new_requests:
        continuation = planned[0].snapshots.hand_over(data.req_id, manager.block_pool)
        if continuation is not None:
            setattr(data, CONTINUATION, continuation)


def _note_setting(planned: PlannedManager, request: Request) -> RequestSetting:
    if (setting := planned.settings.get(request.request_id)) is not None:
        return setting  # of one that waits, and was asked about before
    params = request.sampling_params
    setting = planned.kv_cache_spec.needs.schedule.setting(params and params.extra_args)
    planned.settings[request.request_id] = setting
    return setting
