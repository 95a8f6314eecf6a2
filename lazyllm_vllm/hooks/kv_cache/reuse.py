"""What a request finds of others' work, and what it leaves: called with every request that asks for
blocks, and with every one that gives its blocks back."""

from collections.abc import Callable
from dataclasses import replace

from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.catch_up import (
    begin_unpruned,
    catch_up_chunk,
    cut,
    with_later_stages,
)
from lazyllm_vllm.hooks.kv_cache.managers import (
    PlannedManager,
    PromptManager,
    StageManager,
    planned_managers,
)
from lazyllm_vllm.hooks.kv_cache.snapshots import BlockSet, Snapshot, Taken
from lazyllm_vllm.hooks.turns import PLACES
from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import DEEP, DEFAULT, OFF
from lazyllm_vllm.plan.schedule import TURNS_A_STEP

# Where workers find it in a request's data; and of one that is not pruned how many tokens it has in
# all stages.
CONTINUATION, WHOLE = "lazyllm_continuation", "lazyllm_whole"


def find_blocks(lookup: Callable[[], tuple], manager: KVCacheManager, request: Request) -> tuple:
    """What vLLM's ``get_computed_blocks`` finds for a request, less what the request does not
    want, or more: blocks of later stages, a snapshot to go on from.

    Args:
        lookup: vLLM's own, for this request.
    """
    planned = planned_managers(manager)
    if not planned:
        return lookup()
    first, name = planned[0], request.request_id
    schedule, snapshots = first.kv_cache_spec.needs.schedule, first.snapshots
    params = request.sampling_params
    setting = first.settings[name] = schedule.setting(params and params.extra_args)
    first.watchdog.asks(manager.block_pool, request, first.plans.pop(name, None))
    snapshots.taken.pop(name, None)
    first.found.pop(name, None)
    anew, reuse = schedule.plan(request.num_tokens, setting), schedule.reuse(setting)
    if reuse == OFF and anew.is_pruned:
        request.skip_reading_prefix_cache = True
    found = lookup()
    if (own := snapshots.own(request)) is not None:
        return _go_on(manager, request, Taken(own, own.plan, True), found) or found
    if not anew.is_pruned:
        return begin_unpruned(first, request, *with_later_stages(planned, request, found))
    left = _snapshot_for(first, request, anew) if reuse == DEEP else None
    # By what it generated it may have outgrown the least of a prompt that is pruned.
    first_life = schedule.plan(request.num_prompt_tokens, setting)
    was_unpruned = request.num_preemptions > 0 and not first_life.is_pruned
    if reuse == DEEP or was_unpruned:
        least = left[0].num_tokens if left else 1
        if (unpruned := _go_on_unpruned(manager, request, anew, found, least)) is not None:
            return unpruned
    if left is None:
        return found
    snapshot, plan = left
    # What others read now, more will want to go on from.
    for adopts in (False,) if snapshot.is_read else (False, True):
        if (given := _go_on(manager, request, Taken(snapshot, plan, adopts), found)) is not None:
            return given
    return found


def _snapshot_for(
    planned: PlannedManager, request: Request, anew: RequestPlan
) -> tuple[Snapshot, RequestPlan] | None:
    """Of what others left, from which a request goes on rather than being pruned anew, and its plan
    then."""
    schedule = planned.kv_cache_spec.needs.schedule
    setting = planned.settings[request.request_id]
    wanted = replace(setting, reuse=None)
    hashes, size = planned.hashes(request), planned.block_size
    snapshot = planned.snapshots.find(request, hashes, size, wanted)
    if snapshot is None or not schedule.has_room(snapshot.plan, snapshot.turns):
        return None
    lengths = snapshot.num_tokens, request.num_tokens
    if (long_turn := schedule.long_turn(snapshot.plan, *lengths, setting)) is not None:
        return snapshot, long_turn
    return (snapshot, snapshot.plan) if schedule.goes_on_sooner(lengths[0], anew) else None


def _go_on_unpruned(
    manager: KVCacheManager, request: Request, anew: RequestPlan, found: tuple, least: int
) -> tuple | None:
    """Have a request that would be pruned, as ``anew`` says, go on from prompts that were not, so
    that it is not either. None: they had fewer than ``least`` tokens of its, or it takes less to
    prune it, or there is no room for all of it."""
    planned = planned_managers(manager)
    first, name = planned[0], request.request_id
    schedule = first.kv_cache_spec.needs.schedule
    found, whole = with_later_stages(planned, request, found)
    if whole < least or not schedule.goes_on_sooner(whole, anew):
        return None
    setting = first.settings[name]
    first.settings[name] = replace(setting, schedule=OFF)
    if _has_room(manager, request, found):
        return begin_unpruned(first, request, found, whole)
    first.settings[name] = setting
    del first.plans[name]
    return None


def _go_on(manager: KVCacheManager, request: Request, taken: Taken, found: tuple) -> tuple | None:
    """Have a request go on from a snapshot. None: there is no room for that.

    Args:
        found: as ``find_blocks`` returns it.
    """
    planned = planned_managers(manager)[0]
    # Tokens after the snapshot's run behind the first stage.
    full_blocks = min(found[1], taken.snapshot.num_tokens) // planned.block_size
    found = cut(found, full_blocks, planned.block_size)
    planned.snapshots.taken[request.request_id] = taken
    if _has_room(manager, request, found):
        return found
    del planned.snapshots.taken[request.request_id]
    del planned.plans[request.request_id]
    return None


def _has_room(manager: KVCacheManager, request: Request, found: tuple) -> bool:
    """Whether there are blocks for all of a request, which would begin with ``found``."""
    blocks, hit, *_ = found
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
    return needed + manager.watermark_blocks <= manager.block_pool.get_num_free_blocks()


def chunk_size(scheduler: Scheduler, request: Request, first: int, size: int) -> int:
    """Tokens of a prefill's chunk, from position ``first`` on, if vLLM would give it ``size``.
    0: it waits for a step that has more room.

    A request that goes on, if its last token is to select, takes up to three places in the batch
    (``hooks.turns``), and ``TURNS_A_STEP`` of them have rows for what they revive. Where not even
    one finds places, that token is left to a step of its own, but a long turn revives nothing. The
    tokens that see what it revives come with it: a chunk before leaves them all. For others see
    ``catch_up``.
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
    if not schedule.selects(taken.plan):
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
    alone = size - (taken.plan.long_turn is None)
    return _later(scheduler, window, alone) if snapshots.turns else alone


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
    goes_on = taken and plan.long_turn is None
    if num_tokens < (taken.snapshot.num_tokens if goes_on else plan.num_prompt):
        return None
    setting = first.settings.get(name, DEFAULT)
    full_blocks = num_tokens // first.block_size
    if request.is_finished():
        shares = first.kv_cache_spec.needs.schedule.reuse(setting) == DEEP
        hashes = first.hashes(request)
        is_known = num_tokens <= request.num_tokens and 0 < full_blocks <= len(hashes)
        if not (shares and is_known):
            return None
        name = hashes[full_blocks - 1]
    full, rest = BlockSet({}), BlockSet({})
    for each in planned:
        group = each.kv_cache_group_id
        num_shared = sum(len(taken.by_group[group]) for taken in shared)
        given = each.give_up(request.request_id, num_tokens, num_shared)
        full.by_group[group], rest.by_group[group] = given
    prompt_group = next(m.kv_cache_group_id for m in planned if isinstance(m, PromptManager))
    return Snapshot(
        name=name,
        plan=replace(plan, long_turn=None),
        setting=replace(setting, reuse=None),
        num_tokens=num_tokens,
        # One that was preempted goes on with its own turn.
        turns=taken.snapshot.turns + (taken.snapshot.name != request.request_id) if taken else 0,
        tail=request.all_token_ids[full_blocks * first.block_size : num_tokens],
        full=(*shared, full) if full.blocks else shared,
        rest=rest,
        prompt_block=rest.by_group[prompt_group][0].block_id,
    )


def promised_blocks(manager: KVCacheManager, request: Request) -> set[int]:
    """Ids of a request's blocks in the prefix cache that nobody computes if the chunk that it was
    just given is taken back."""
    promised, name = set(), request.request_id
    of_groups = manager.coordinator.single_type_managers
    for each, blocks in zip(of_groups, manager.get_blocks(name).blocks):
        first = request.num_computed_tokens
        if isinstance(each, StageManager) and name in each.found:
            found = each.found[name]  # with its first chunk it catches up with what it found
            first = found.whole if first == found.tokens else first
        promised |= {block.block_id for block in blocks[first // each.block_size :]}
    return promised


def hand_over(manager: KVCacheManager, new_requests: list[NewRequestData]) -> None:
    """Tell workers, in the data of requests that were just scheduled for the first time, where
    those that go on do so, and what those have that found blocks of later stages."""
    planned = planned_managers(manager)
    if not planned:
        return
    snapshots, found = planned[0].snapshots, planned[0].found
    snapshots.turns = 0
    planned[0].new.clear()
    for data in new_requests:
        if (mine := found.get(data.req_id)) is not None and mine.whole:
            setattr(data, WHOLE, mine.whole)
        continuation = snapshots.hand_over(data.req_id, manager.block_pool)
        if continuation is not None:
            setattr(data, CONTINUATION, continuation)
