"""Turns: requests that go on from what others left, in the step in which their prompt ends.

The last token of a turn tells, with those shortly before it, what is to be revived, and all of them
see that. vLLM has them among the rows of the request's chunk. Here the request comes more than once
in the batch: with its last token among the decodes, with the tokens that see what it revives among
the prefills, and, if the chunk has more, with those as a prefill before. Where the last token is
all that has not run behind stage 0, as after preemption, it is a decode like any other.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from lazyllm_vllm.runtime.turns import Turns

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
    """A place in the batch: some tokens of one of vLLM's requests, from position ``first`` on."""

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
    batch: InputBatch, num_decodes: int, turns: Sequence[Turn], block_tables: Sequence[torch.Tensor]
) -> tuple[InputBatch, Turns]:
    """Args:
        batch: vLLM's, decodes first.
        turns: those that are decodes last.
        block_tables: ``[max_num_reqs, blocks]`` each, of this batch; they are put in its new order.

    Returns:
        The batch, of which only what a step's plan reads is right, and its turns, whose last tokens
        come before all else.
    """
    real = [turn for turn in turns if not turn.is_decode]
    lasts = [_Member(turn.request, turn.last, 1) for turn in turns]
    first = batch.num_computed_prefill_tokens_np
    decodes = [_Member(i, int(first[i]), 1) for i in range(num_decodes)]
    prefills = _prefills(batch, num_decodes, turns)
    k, count = len(real), num_decodes + len(turns)
    members = [*lasts[:k], *decodes, *lasts[k:], *prefills]

    requests = np.array([member.request for member in members])
    counts = np.array([member.count for member in members], np.int32)
    firsts = np.array([member.first for member in members], np.int32)
    begin = batch.query_start_loc_np[requests] + firsts - first[requests]
    rows = np.concatenate([np.arange(at, at + n) for at, n in zip(begin, counts)])
    sampled = np.zeros(batch.num_reqs, np.int64)
    sampled[requests[count:]] = np.arange(count, len(members))
    sampled[requests[:count]] = np.arange(count)
    packed = async_tensor_h2d(
        np.concatenate([rows, sampled, requests]), device=batch.positions.device
    )
    rows, sampled, on_device = packed.split([len(rows), len(sampled), len(requests)])
    for table in block_tables:
        assert len(members) <= len(table), "the scheduler leaves room for them"
        table[: len(members)] = table[on_device]
    is_prefilling = batch.is_prefilling_np[requests]
    is_prefilling[:count] = False
    again = replace(
        batch,
        req_ids=[batch.req_ids[i] for i in requests],
        num_reqs=len(members),
        num_reqs_after_padding=len(members),
        idx_mapping=batch.idx_mapping[on_device],
        idx_mapping_np=batch.idx_mapping_np[requests],
        num_scheduled_tokens=counts,
        num_computed_prefill_tokens_np=firsts,
        prefill_len_np=batch.prefill_len_np[requests],
        is_prefilling_np=is_prefilling,
        positions=batch.positions[rows],
    )
    tokens = np.array([turn.last + 1 - turn.seeing for turn in real], np.int32)
    nothing = [0] * len(turns[0].revived)
    revived = np.array([turn.revived for turn in real], np.int32).reshape(k, len(nothing)).T
    seeing = {(turn.request, turn.seeing): turn.revived for turn in real}
    sees = np.array([member[:2] in seeing for member in prefills], bool)
    seen = np.array([seeing.get(member[:2], nothing) for member in prefills], np.int32)
    return again, Turns(tokens, revived, sees, seen.T, requests, rows, sampled)


def _prefills(batch: InputBatch, num_decodes: int, turns: Sequence[Turn]) -> list[_Member]:
    """Each prefill without a turn's last token, and the tokens before it that see what it revives
    on their own."""
    prefills, of_turn = [], {turn.request: turn for turn in turns}
    for i in range(num_decodes, batch.num_reqs):
        first = int(batch.num_computed_prefill_tokens_np[i])
        bounds = [first, first + int(batch.num_scheduled_tokens[i])]
        if i in of_turn:
            bounds = [first, of_turn[i].seeing, of_turn[i].last]
        parts = zip(bounds, bounds[1:])
        prefills += [_Member(i, start, end - start) for start, end in parts if start < end]
    return prefills
