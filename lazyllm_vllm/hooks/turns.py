"""Turns: requests that go on from what others left, in the step in which their prompt ends.

The last token of a turn tells, with those shortly before it, what is to be revived, and all of them
see that. vLLM has them among the rows of the request's chunk. Here the request comes more than once
in the batch: among the decodes, which is its last token's place behind stage 0, beside the rows of
what is revived; among the prefills, with the tokens that see that; and, if the chunk has more, with
those as a prefill before. In stage 0 the last token is the last of a prefill, as in vLLM's batch,
and its row among the decodes is nobody's. Where it is all that has not run behind stage 0, as after
preemption, it is a decode like any other.

A batch for a CUDA graph (``turn_graphs``) is padded: with decodes of no request, and with a prefill
of none.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from lazyllm_vllm.runtime.turns import Turns, TurnShape

if TYPE_CHECKING:
    from lazyllm_vllm.hooks.model_state import LazyModelState

PLACES = 3  # of a turn in a batch, at most


class Turn(NamedTuple):
    """Attributes:
    request: of vLLM's batch.
    seeing: position of the first token that sees what is revived; last: of the last token.
    revived: by stage, how many tokens are revived.
    """

    request: int
    seeing: int
    last: int
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


def turns_of(state: "LazyModelState", batch: InputBatch, num_decodes: int) -> list[Turn]:
    """Of a batch's requests those that go on with a chunk that ends their prompt, and whose last
    token is to select; those of which that token is a decode like others come last."""
    first, end, turns = batch.num_computed_prefill_tokens_np, batch.prefill_len_np, []
    ends = (first + batch.num_scheduled_tokens == end) & (batch.num_scheduled_tokens > 1)
    schedule, plans = state.schedule, state.plans
    for i, req_id in enumerate(batch.req_ids[num_decodes:], num_decodes):
        if req_id in state.continuations and ends[i] and schedule.selects(plans[req_id]):
            window_first = int(end[i]) - schedule.config.score_window
            seeing = max(int(first[i]), state.caught_up[req_id], window_first)
            turns.append(Turn(i, seeing, int(end[i]) - 1, []))
    turns.sort(key=lambda turn: turn.is_decode)
    count = sum(not turn.is_decode for turn in turns)
    most = schedule.turn_quota(count) if count else 0
    for at, turn in enumerate(turns):
        req_id = batch.req_ids[turn.request]
        revived = state.continuations.revivable(req_id, plans[req_id], most)
        turns[at] = turn._replace(revived=revived)
    return turns


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
        shape: what the batch is to have, of one turn that is no decode.

    Returns:
        The batch, of which only what a step's plan reads is right, and its turns, whose last tokens
        come before all else.
    """
    real = [turn for turn in turns if not turn.is_decode]
    lasts = [_Member(turn.request, turn.last, 1) for turn in turns]
    first = batch.num_computed_prefill_tokens_np
    decodes = [_Member(i, int(first[i]), 1) for i in range(num_decodes)]
    prefills = _prefills(batch, num_decodes, turns, keeps_empty=shape is not None)
    padding = []
    if shape is not None:
        decodes += [_Member(-1, 0, 1)] * (shape.decodes - num_decodes)
        padding = [_Member(-1, 0, shape.rows - sum(member.count for member in prefills))]
    k, count = len(real), len(decodes) + len(turns)
    members = [*lasts[:k], *decodes, *lasts[k:], *prefills, *padding]

    requests = np.array([member.request for member in members])
    counts = np.array([member.count for member in members], np.int32)
    firsts = np.array([member.first for member in members], np.int32)
    begin = batch.query_start_loc_np[requests] + firsts - first[requests]
    rows = np.concatenate([np.arange(at, at + n) for at, n in zip(begin, counts)])
    rows[np.repeat(requests < 0, counts)] = -1
    sampled = np.zeros(batch.num_reqs, np.int64)
    places = np.arange(len(members))
    seers = [places[count:][requests[count:] == turn.request][-1] for turn in real]
    for some in (places[count:], places[:count]):  # the last token of a turn after the others
        some = some[requests[some] >= 0]
        sampled[requests[some]] = some
    index = np.where(requests < 0, -1, batch.idx_mapping_np[requests])
    packed = (rows, sampled, np.maximum(requests, 0), index)
    on_device = async_tensor_h2d(np.concatenate(packed), device=batch.positions.device)
    rows, sampled, tables, on_device = on_device.split([len(part) for part in packed])
    for table in block_tables:
        assert len(members) <= len(table), "the scheduler leaves room for them"
        table[: len(members)] = table[tables]
    again = replace(
        batch,
        req_ids=["" if i < 0 else batch.req_ids[i] for i in requests],
        num_reqs=len(members),
        num_reqs_after_padding=len(members),
        idx_mapping=on_device.to(batch.idx_mapping.dtype),
        idx_mapping_np=index,
        num_scheduled_tokens=counts,
        num_computed_prefill_tokens_np=firsts,
        prefill_len_np=np.where(requests < 0, counts, batch.prefill_len_np[requests]),
        is_prefilling_np=places >= count,
        positions=batch.positions[rows],
    )
    tokens = np.array([turn.last + 1 - turn.seeing for turn in real], np.int32)
    nothing = [0] * len(turns[0].revived)
    revived = np.array([turn.revived for turn in real], np.int32).reshape(k, len(nothing)).T
    seeing = {(turn.request, turn.seeing): turn.revived for turn in real}
    last_rows = np.cumsum(counts)[seers].astype(np.int32) - 1
    of_prefills = [seeing.get(member[:2]) if member.count else None for member in prefills]
    sees = np.array([found is not None for found in of_prefills], bool)
    seen = np.array([found or nothing for found in of_prefills], np.int32).reshape(-1, len(nothing))
    found = tokens, last_rows, revived, sees, seen.T
    return again, Turns(*found, requests, rows, sampled, shape)


def _prefills(
    batch: InputBatch, num_decodes: int, turns: Sequence[Turn], keeps_empty: bool
) -> list[_Member]:
    """Each prefill, of a turn the tokens that see what it revives on their own. Turns have both
    parts, one of them perhaps empty, if ``keeps_empty``. The last token of one that is a decode is
    in none."""
    prefills, of_turn = [], {turn.request: turn for turn in turns}
    for i in range(num_decodes, batch.num_reqs):
        first = int(batch.num_computed_prefill_tokens_np[i])
        bounds = [first, first + int(batch.num_scheduled_tokens[i])]
        if i in of_turn:
            turn = of_turn[i]
            bounds = [first, turn.seeing, turn.last + (not turn.is_decode)]
        parts = zip(bounds, bounds[1:])
        parts = [(start, end) for start, end in parts if keeps_empty or start < end]
        prefills += [_Member(i, start, end - start) for start, end in parts]
    return prefills
