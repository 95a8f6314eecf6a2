"""How much of a pruned prompt's later stages runs in one step.

Work is counted in layer-rows, rows times layers. A step of stock vLLM has at most as many as its
budget of tokens times the model's layers, and each row attends to no fewer keys than one behind a
boundary.
"""

from typing import NamedTuple

from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.schedule import Schedule


class Leg(NamedTuple):
    """A step of a prompt whose later stages are spread over several; all that is needed to plan it.

    Attributes:
        ran: rows that ran in each stage in the steps before, zeros in the first.
        until: the same after this step; those that the plan keeps: it is the last.
    """

    ran: tuple[int, ...]
    until: tuple[int, ...]


def work_left(schedule: Schedule, plan: RequestPlan, ran: tuple[int, ...]) -> int:
    """Layer-rows of the later stages that have not run."""
    each = zip(schedule.stage_sizes[1:], plan.kept[1:], ran[1:], strict=True)
    return sum(size * (kept - done) for size, kept, done in each)


def advance(
    schedule: Schedule, plan: RequestPlan, ran: tuple[int, ...], room: int
) -> tuple[int, ...]:
    """``Leg.until`` of a step in which the later stages may have ``room`` layer-rows.

    Stage follows on stage. The last rows of one, which score for the next boundary, run at once;
    with room for as many in all layers (``least_room``) some rows run.
    """
    until = [plan.num_prompt, *ran[1:]]
    for stage in range(1, schedule.num_stages):
        size, left = schedule.stage_sizes[stage], plan.kept[stage] - ran[stage]
        if size * left > room:
            at_once = schedule.config.score_window if stage < schedule.num_stages - 1 else 1
            until[stage] += min(max(room, 0) // size, max(left - at_once, 0))
            break
        room -= size * left
        until[stage] = plan.kept[stage]
    return tuple(until)


def share_room(
    schedule: Schedule, prompts: list[tuple[RequestPlan, tuple[int, ...]]], room: int
) -> list[Leg]:
    """What prompts run of their later stages in one step: the first gets what it needs, then the
    next. The first of those that have waited for this step gets on, whatever the room.

    Args:
        prompts: of each its plan, and the rows that ran before.
        room: layer-rows for all of them.
    """
    legs: list[Leg] = []
    for plan, ran in prompts:
        if ran[0] and not any(leg.ran[0] for leg in legs):
            room = max(room, least_room(schedule))
        until = advance(schedule, plan, ran, room)
        room -= work_left(schedule, plan, ran) - work_left(schedule, plan, until)
        legs.append(Leg(ran, until))
    return legs


def least_room(schedule: Schedule) -> int:
    """Layer-rows with which a prompt gets on, however little is left."""
    return schedule.config.score_window * schedule.num_layers
