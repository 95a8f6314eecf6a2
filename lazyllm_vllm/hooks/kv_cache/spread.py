"""A long prompt's later stages over several steps, where others would have to wait for them.

The last chunk of a pruned prompt brings the work of all its later stages. Where that is more than
stock vLLM does in a step, and other requests are in the batch, the prompt's last token is held
back: vLLM schedules it again, step after step, and each runs a part of the rows (``plan.spread``).
Only the last of these steps samples. The next ones set tokens of vLLM's budget aside, as if the
rows were tokens of a prompt; decodes, and what was there before, come first.

With ``keep_mass`` the scheduler does not know how many rows there are, and nothing is spread.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from vllm.utils.math_utils import cdiv
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.plan.spread import Leg, share_room, work_left

LEGS = "lazyllm_legs"  # where workers find, by request, the ``Leg`` that a step runs


@contextmanager
def tokens_set_aside(scheduler: Scheduler) -> Iterator[None]:
    """Schedule a step with a smaller budget, if rows of prompts that are held back take of it."""
    planned = planned_managers(scheduler.kv_cache_manager)
    if not (planned and planned[0].ran):
        yield
        return
    budget = scheduler.max_num_scheduled_tokens
    schedule, plans, ran = planned[0].kv_cache_spec.needs.schedule, planned[0].plans, planned[0].ran
    work = sum(work_left(schedule, plans[req_id], ran[req_id]) for req_id in ran)
    room = budget - _tokens_before(scheduler, ran.keys())
    scheduler.max_num_scheduled_tokens -= max(min(cdiv(work, schedule.num_layers), room), 0)
    try:
        yield
    finally:
        scheduler.max_num_scheduled_tokens = budget


def _tokens_before(scheduler: Scheduler, held: set[str]) -> int:
    """Tokens that come before the rows of prompts that are held back: these prompts' own, decodes,
    and chunks of prompts that have been running for longer."""
    most = scheduler.scheduler_config.long_prefill_token_threshold or scheduler.max_model_len
    tokens, is_before = 0, False
    for request in reversed(scheduler.running):
        is_held = request.request_id in held
        is_before |= is_held
        if is_held or not request.is_prefill_chunk:
            tokens += 1
        elif is_before:
            tokens += min(request.num_tokens - request.num_computed_tokens, most)
    return tokens


def spread(scheduler: Scheduler, output: SchedulerOutput) -> None:
    """Tell workers which rows run of prompts that end in the step just scheduled, where these are
    not all, and hold back those that have rows left."""
    planned = planned_managers(scheduler.kv_cache_manager)
    if not planned:
        return
    schedule, plans, ran = planned[0].kv_cache_spec.needs.schedule, planned[0].plans, planned[0].ran
    counts, requests = output.num_scheduled_tokens, scheduler.requests
    ending = [r for r in counts if requests[r].num_computed_tokens == plans[r].num_prompt]
    if not ending or schedule.config.keep_mass is not None:  # as in every decode step
        return
    room = scheduler.max_num_scheduled_tokens - output.total_num_scheduled_tokens
    room *= schedule.num_layers
    long = {}
    for req_id in ending:
        plan, had = plans[req_id], ran.get(req_id, (0,) * schedule.num_stages)
        share = counts[req_id] * (schedule.num_layers - schedule.stage_sizes[0])
        if not plan.is_pruned or req_id in planned[0].snapshots.taken:
            continue
        if req_id in ran or work_left(schedule, plan, had) > share:
            room += share
            long[req_id] = plan, had
    if not long:
        return
    if len(counts) == 1:  # nobody waits
        legs = [Leg(had, plan.kept) for plan, had in long.values()]
    else:
        legs = share_room(schedule, list(long.values()), room)
    setattr(output, LEGS, dict(zip(long, legs)))
    for req_id, leg in zip(long, legs):
        ran.pop(req_id, None)
        if leg.until != plans[req_id].kept:
            ran[req_id] = leg.until
            _hold_back(scheduler, requests[req_id])


def _hold_back(scheduler: Scheduler, request: Request) -> None:
    """Undo what vLLM noted of a prompt that ends in the step just scheduled, so that its last token
    is to come, and no token of an answer."""
    request.num_computed_tokens -= 1
    request.is_prefill_chunk = True
    request.num_output_placeholders = 0
    scheduler._inflight_prefills.add(request)
