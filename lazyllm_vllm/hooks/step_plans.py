"""From vLLM's batch to the plan of a step: which kind of ``Step`` it is, and what that is told."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from vllm.v1.worker.gpu.input_batch import InputBatch

from lazyllm_vllm.plan.spread import Leg
from lazyllm_vllm.runtime.plain_step import Chunks, PlainStep
from lazyllm_vllm.runtime.prefill_rows import Prefills
from lazyllm_vllm.runtime.step import Batch, Step
from lazyllm_vllm.runtime.step_kind import StepKind
from lazyllm_vllm.runtime.turns import Turns

if TYPE_CHECKING:
    from lazyllm_vllm.hooks.model_state import LazyModelState


def sort_prefills(state: "LazyModelState", batch) -> bool:
    """Take those that run as decodes do out of the prefills of vLLM's ``BatchReqState``. Returns
    whether all stages run the rows that vLLM gives."""
    is_prefilling, runs_alike = batch.is_prefilling_np, True
    for i in is_prefilling.nonzero()[0].tolist():
        req_id, first = batch.req_ids[i], int(batch.num_computed_prefill_tokens_np[i])
        caught_up = state.caught_up[req_id] == first
        is_last = batch.num_scheduled_tokens[i] == 1 and first + 1 == batch.prefill_len_np[i]
        plan, goes_on = state.plans[req_id], req_id in state.continuations
        if is_last and caught_up and goes_on and plan.long_turn is None:
            is_prefilling[i] = False
        elif not caught_up or plan.is_pruned:
            runs_alike = False
    return runs_alike


def is_plain(state: "LazyModelState", batch: InputBatch, num_decodes: int) -> bool:
    """Whether a batch can run as a ``PlainStep``."""
    req_ids = batch.req_ids
    return (
        state.batch_runs_alike
        and num_decodes < len(req_ids)
        and state.trace is None  # which looks at every boundary's rows
        and state.wants_prompt.isdisjoint(req_ids)
        and not any(state.plans[req_id].is_pruned for req_id in req_ids[:num_decodes])
    )


def plain_step(
    state: "LazyModelState", batch: InputBatch, num_decodes: int, slot_mappings: torch.Tensor
) -> PlainStep:
    """The plan of a batch that ``is_plain``; its decodes come first."""
    first = batch.num_computed_prefill_tokens_np[num_decodes:]
    lengths = batch.num_scheduled_tokens[num_decodes:]
    state.caught_up.update(zip(batch.req_ids[num_decodes:], (first + lengths).tolist()))
    of_step = Batch(
        req_ids=batch.req_ids,
        num_decodes=num_decodes,
        prefills=None,
        positions=batch.positions,
        sampled_tokens=batch.logits_indices,
        slot_mappings=slot_mappings,
    )
    starts = batch.query_start_loc[: batch.num_reqs + 1]
    chunks = Chunks(first.tolist(), lengths.tolist(), starts, batch.seq_lens)
    return PlainStep(of_step, chunks, state.schedule, state.buffers)


def planned_step(
    state: "LazyModelState",
    kind: StepKind,
    batch: InputBatch,
    num_decodes: int,
    slot_mappings: torch.Tensor,
    turns: Turns | None,
) -> Step:
    """The plan of any other step that does not only replay a graph."""
    req_ids = batch.req_ids
    pruned_tokens = None
    if kind is StepKind.RUN:
        prefilled = [req_id for req_id in req_ids[num_decodes:] if req_id]  # padding comes last
        end = num_decodes + len(prefilled)
        prefills = _prefills(state, batch, range(num_decodes, end), turns)
        has_turns = turns is not None and len(turns.tokens) > 0
        selects = has_turns or not state.selecting.keys().isdisjoint(req_ids[:num_decodes])
        state.stats.selecting_steps += selects
        later_end = prefills.later_end(state.buffers.budget)
        caught_up = np.maximum(later_end, prefills.caught_up) - prefills.is_held_back
        state.caught_up.update(zip(prefilled, caught_up.tolist()))
        if turns is not None and turns.shape is not None:
            prefills = prefills.padded(batch.num_scheduled_tokens[end:].tolist())
        if state.boundary.reduction is not None:
            plans = (state.plans[req_id] for req_id in set(req_ids))
            pruned_tokens = sum(plan.num_prompt for plan in plans if plan.is_pruned)
    else:
        lengths = batch.num_scheduled_tokens[num_decodes:]
        prefills = Prefills.whole([int(n) for n in lengths], state.schedule.num_stages)
        selects = kind in (StepKind.CAPTURE_SELECTING, StepKind.WARM_UP)
        if kind is StepKind.WARM_UP and num_decodes > 1:
            turns = Turns.made_up(state.schedule.num_stages, batch)
    if kind.is_in_full_graph:
        num_decodes = batch.num_reqs_after_padding
    of_step = Batch(
        req_ids=req_ids,
        num_decodes=num_decodes,
        prefills=prefills,
        positions=batch.positions,
        sampled_tokens=batch.logits_indices,
        slot_mappings=slot_mappings,
        wants_all_rows=not state.wants_prompt.isdisjoint(req_ids),
        pruned_tokens=pruned_tokens,
        turns=turns,
    )
    step = Step(kind, of_step, state.schedule, state.buffers, selects)
    if kind is StepKind.RUN:
        state.held_back.begin_step(step, batch.seq_lens)
    return step


def _prefills(
    state: "LazyModelState", batch: InputBatch, which: range, turns: Turns | None
) -> Prefills:
    mine = slice(which.start, which.stop)
    req_ids, num_scheduled = batch.req_ids[mine], batch.num_scheduled_tokens[mine]
    plans = [state.plans[req_id] for req_id in req_ids]

    def ints(values) -> np.ndarray:
        return np.array(list(values), np.int32)

    first = batch.num_computed_prefill_tokens_np[mine].astype(np.int32)
    whole = (Leg((0,) * len(plan.kept), plan.kept) for plan in plans)
    legs = [state.legs.get(req_id, leg) for req_id, leg in zip(req_ids, whole)]

    def by_stage(values) -> np.ndarray:
        return ints(values).reshape(-1, state.schedule.num_stages).T

    goes_on = np.array([req_id in state.continuations for req_id in req_ids], bool)
    is_long = np.array([plan.long_turn is not None for plan in plans], bool)
    before = state.continuations.before(req_ids, plans)
    caught_up = ints(state.caught_up[req_id] for req_id in req_ids)
    shift = state.continuations.shift(req_ids)
    sees_revived, leads = np.zeros((2, len(plans)), bool)
    if turns is not None:
        sees_revived, leads = turns.sees, turns.leads
        shift = shift + turns.seen  # which stand before them
        # The turn's tokens before them are a prefill of this step.
        caught_up = np.where(sees_revived, np.maximum(caught_up, first), caught_up)
    kept = by_stage(plan.kept for plan in plans)
    until = by_stage(leg.until for leg in legs)
    ran = by_stage(leg.ran for leg in legs)
    for at in is_long.nonzero()[0].tolist():
        turn = plans[at].long_turn
        kept[:, at] = before[:, at] + turn.chosen + (0 if leads[at] else turn.last)
        until[:, at], ran[1:, at] = kept[:, at], before[1:, at]
    return Prefills(
        num_prompt=batch.prefill_len_np[mine].astype(np.int32),
        first=first,
        end=first + num_scheduled.astype(np.int32),
        caught_up=caught_up,
        is_pruned=np.array([plan.is_pruned for plan in plans], bool)
        & (~goes_on | (is_long & ~sees_revived)),
        sees_revived=sees_revived,
        leads=leads,
        begin=ints(plan.long_turn.begin if plan.long_turn else 0 for plan in plans),
        before=before,
        kept=kept,
        shift=shift,
        ran=ran,
        until=until,
    )
