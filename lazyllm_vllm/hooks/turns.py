"""Turns: requests that go on from what others left, in the step in which their prompt ends.

The last token of a turn tells, with those shortly before it, what is to be revived, and all of them
see that. vLLM has them among the rows of the request's chunk. Here the request comes more than once
in the batch: among the decodes, which is its last token's place behind stage 0, beside the rows of
what is revived; among the prefills, with the tokens that see that; and, if the chunk has more, with
those as a prefill before. In stage 0 the last token is the last of a prefill, as in vLLM's batch,
and its row among the decodes is nobody's. Where it is all that has not run behind stage 0, as after
preemption, it is a decode like any other.

A batch for a CUDA graph (``turn_graphs``) is padded: with turns and decodes of no request, and with
a prefill of none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.utils import PAD_SLOT_ID
from vllm.v1.worker.gpu.input_batch import InputBatch

from lazyllm_vllm.plan.schedule import TURNS_A_STEP
from lazyllm_vllm.runtime.turns import Turns, TurnShape

if TYPE_CHECKING:
    from lazyllm_vllm.hooks.model_state import LazyModelState

PLACES = 3  # of a turn in a batch, at most


class Turn(NamedTuple):
    """Attributes:
    request: of vLLM's batch.
    seeing: position of the first token that sees what is revived; last: of the last token.
    end: before which tokens may be revived; is_long: whether tokens of its own are dropped.
    revived: by stage, how many tokens are revived.
    """

    request: int
    seeing: int
    last: int
    end: int
    is_long: bool
    revived: list[int]

    @property
    def is_decode(self) -> bool:
        return self.seeing == self.last


class _Member(NamedTuple):
    """A place in the batch: some tokens of one of vLLM's requests, from position ``first`` on.
    Request -1: padding."""

    request: int
    first: int
    count: int


class _Members(NamedTuple):
    """The places of a batch, in order.

    Attributes:
        turns: how many of the decodes, the first ones, are the last tokens of turns.
        decodes: with them those of padding; padding: prefills.
    """

    turns: int
    decodes: list[_Member]
    prefills: list[_Member]
    padding: list[_Member]

    @property
    def all(self) -> list[_Member]:
        return [*self.decodes, *self.prefills, *self.padding]


def give_places(
    state: "LazyModelState", num_decodes: int, batch: InputBatch, slot_mappings: torch.Tensor
) -> tuple[InputBatch, torch.Tensor, Turns | None]:
    """A batch and its slot mappings, ``[groups, rows]``, as they are if no turn is in it; else with
    every turn in its places, and what the step's plan knows of the turns."""
    found, shape = turns_of(state, batch, num_decodes)
    if not found:
        return batch, slot_mappings, None
    batch, turns = split(batch, num_decodes, found, state.block_tables, shape)
    if not state.boundary.scorer.every_layer:  # it asks the last token alone
        turns = turns._replace(last_rows=np.full_like(turns.last_rows, -1))
    slot_mappings = slot_mappings[:, turns.rows].masked_fill_(turns.rows < 0, PAD_SLOT_ID)
    slot_mappings[:, : len(turns.tokens)] = PAD_SLOT_ID  # nobody's rows
    return batch, slot_mappings, turns


def turns_of(
    state: "LazyModelState", batch: InputBatch, num_decodes: int
) -> tuple[list[Turn], TurnShape | None]:
    """Of a batch's requests those that go on with a chunk that ends their prompt, and whose last
    token is to select; those of which that token is a decode like others come last. With them what
    the batch is to be padded to, if it runs in a CUDA graph."""
    first, end, turns = batch.num_computed_prefill_tokens_np, batch.prefill_len_np, []
    ends = (first + batch.num_scheduled_tokens == end) & (batch.num_scheduled_tokens > 1)
    schedule, plans = state.schedule, state.plans
    for i, req_id in enumerate(batch.req_ids[num_decodes:], num_decodes):
        if req_id in state.continuations and ends[i] and schedule.selects(plans[req_id]):
            window_first = int(end[i]) - schedule.config.score_window
            seeing = max(int(first[i]), state.caught_up[req_id], window_first)
            long_turn = plans[req_id].long_turn
            if long_turn and seeing > window_first:  # some of the last tokens have run in stage 0
                continue
            revivable = long_turn.begin if long_turn else plans[req_id].num_prompt
            turns.append(Turn(i, seeing, int(end[i]) - 1, revivable, long_turn is not None, []))
    turns = _with_places(turns, state.max_num_reqs - batch.num_reqs)
    turns.sort(key=lambda turn: turn.is_decode)
    shape = _shape_of(state, batch, num_decodes, turns) if turns else None
    for at, turn in enumerate(turns):
        req_id = batch.req_ids[turn.request]
        revived = state.continuations.revivable(req_id, plans[req_id], schedule.turn_quota)
        turns[at] = turn._replace(revived=revived)
    return turns, shape


def _with_places(turns: list[Turn], room: int) -> list[Turn]:
    """Those that find places beside so many others. The scheduler leaves them for all but the long
    ones; of these one that finds none is no turn: its last tokens are chosen among like the rest,
    and it revives nothing."""
    shorts, longs = ([t for t in turns if t.is_long == is_long] for is_long in (False, True))
    most = min(TURNS_A_STEP, room // (PLACES - 1)) - len(shorts)
    return shorts + longs[: max(most, 0)] if longs else turns


def _shape_of(
    state: "LazyModelState", batch: InputBatch, num_decodes: int, turns: Sequence[Turn]
) -> TurnShape | None:
    """Of the CUDA graph that a batch runs in: of turns that have caught up, and decodes. None: it
    runs in none."""
    graphs, first = state.model.turn_graphs, batch.num_computed_prefill_tokens_np
    is_alike = batch.num_reqs == num_decodes + len(turns) and not turns[-1].is_decode
    is_alike &= not any(turn.is_long for turn in turns)
    if graphs is None or not is_alike or not state.wants_prompt.isdisjoint(batch.req_ids):
        return None
    if any(state.caught_up[batch.req_ids[turn.request]] < first[turn.request] for turn in turns):
        return None
    num_rows = int(batch.num_scheduled_tokens[num_decodes:].sum())
    return graphs.shape(len(turns), num_decodes, num_rows)


def split(
    batch: InputBatch,
    num_decodes: int,
    turns: Sequence[Turn],
    block_tables: Sequence[torch.Tensor],
    shape: TurnShape | None = None,
) -> tuple[InputBatch, Turns]:
    """Args:
        batch: vLLM's, decodes first.
        turns: those that are decodes last.
        block_tables: ``[max_num_reqs, blocks]`` each, of this batch; they are put in its new order.
        shape: what the batch is to have, if no turn is a decode.

    Returns:
        The batch, of which only what a step's plan reads is right, and its turns, whose last tokens
        come before all else.
    """
    members = _members(batch, num_decodes, turns, shape)
    requests, firsts, counts = np.array(members.all, np.int32).T
    places, count = np.arange(len(requests)), len(members.decodes)
    begin = batch.query_start_loc_np[requests] + firsts
    begin -= batch.num_computed_prefill_tokens_np[requests]
    rows = np.concatenate([np.arange(at, at + n) for at, n in zip(begin, counts)])
    rows[np.repeat(requests < 0, counts)] = -1
    sampled = np.zeros(batch.num_reqs, np.int64)
    for some in (places[count:], places[:count]):  # the last token of a turn after the others
        some = some[requests[some] >= 0]
        sampled[requests[some]] = some
    index = np.where(requests < 0, -1, batch.idx_mapping_np[requests])
    packed = (rows, sampled, np.maximum(requests, 0), index)
    on_device = async_tensor_h2d(np.concatenate(packed), device=batch.positions.device)
    rows, sampled, tables, on_device = on_device.split([len(part) for part in packed])
    for table in block_tables:
        assert len(places) <= len(table), "the scheduler leaves room for them"
        table[: len(places)] = table[tables]
    again = replace(
        batch,
        req_ids=["" if i < 0 else batch.req_ids[i] for i in requests],
        num_reqs=len(places),
        num_reqs_after_padding=len(places),
        idx_mapping=on_device.to(batch.idx_mapping.dtype),
        idx_mapping_np=index,
        num_scheduled_tokens=counts,
        num_computed_prefill_tokens_np=firsts,
        prefill_len_np=np.where(requests < 0, counts, batch.prefill_len_np[requests]),
        is_prefilling_np=places >= count,
        positions=batch.positions[rows],
    )
    of_turns = _of_turns(turns, members, np.cumsum(counts).tolist())
    return again, Turns(*of_turns, requests, rows, sampled, shape)


def _members(
    batch: InputBatch, num_decodes: int, turns: Sequence[Turn], shape: TurnShape | None
) -> _Members:
    first = batch.num_computed_prefill_tokens_np
    lasts = [_Member(turn.request, turn.last, 1) for turn in turns]
    num_turns = sum(not turn.is_decode for turn in turns)
    lasts, after = lasts[:num_turns], lasts[num_turns:]
    decodes = [_Member(i, int(first[i]), 1) for i in range(num_decodes)]
    prefills = _prefills(batch, num_decodes, turns, keeps_empty=shape is not None)
    if shape is None:
        return _Members(num_turns, [*lasts, *decodes, *after], prefills, [])
    none, missing = _Member(-1, 0, 1), shape.rows - sum(member.count for member in prefills)
    lasts += [none] * (shape.turns - num_turns)
    decodes += [none] * (shape.decodes - num_decodes)
    padding = [_Member(-1, 0, 0)] * (2 * (shape.turns - num_turns)) + [_Member(-1, 0, missing)]
    return _Members(shape.turns, [*lasts, *decodes], prefills, padding)


def _of_turns(turns: Sequence[Turn], members: _Members, row_ends: list[int]) -> tuple:
    """The first fields of ``Turns``.

    Args:
        row_ends: of each member, the row after its last.
    """
    stages, prefills = len(turns[0].revived), members.prefills
    tokens, ends = np.zeros((2, members.turns), np.int32)
    last_rows = np.full(members.turns, -1, np.int32)
    revived = np.zeros((stages, members.turns), np.int32)
    sees, leads = np.zeros((2, len(prefills)), bool)
    seen = np.zeros((stages, len(prefills)), np.int32)
    places = {member[:2]: i for i, member in enumerate(prefills) if member.count}
    for i, turn in enumerate(turn for turn in turns if not turn.is_decode):
        place = places[turn.request, turn.seeing]
        tokens[i] = prefills[place].count
        last_rows[i] = row_ends[len(members.decodes) + place] - 1
        ends[i] = turn.end
        revived[:, i] = seen[:, place] = turn.revived
        sees[place] = True
        leads[place - 1] |= turn.is_long
    return tokens, last_rows, ends, revived, sees, seen, leads


def _prefills(
    batch: InputBatch, num_decodes: int, turns: Sequence[Turn], keeps_empty: bool
) -> list[_Member]:
    """Each prefill, of a turn the tokens that see what it revives on their own. Turns have both
    parts, one of them perhaps empty, if ``keeps_empty``, and long ones always. The last token of
    one that is a decode is in none."""
    prefills, of_turn = [], {turn.request: turn for turn in turns}
    for i in range(num_decodes, batch.num_reqs):
        first = int(batch.num_computed_prefill_tokens_np[i])
        bounds, keeps = [first, first + int(batch.num_scheduled_tokens[i])], keeps_empty
        if i in of_turn:
            turn = of_turn[i]
            bounds = [first, turn.seeing, turn.last + (not turn.is_decode)]
            keeps |= turn.is_long
        parts = zip(bounds, bounds[1:])
        parts = [(start, end) for start, end in parts if keeps or start < end]
        prefills += [_Member(i, start, end - start) for start, end in parts]
    return prefills
