"""A worker's side of requests that go on from a snapshot: blocks copied on the device, and the
counts of requests that left one."""

from itertools import chain

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.kernels.copy_blocks import copy_blocks
from lazyllm_vllm.plan.request_plan import Continuation, RequestPlan
from lazyllm_vllm.runtime.request_table import RequestRow, RowCopy


class BlockCopier:
    """Copies whole blocks of the KV cache's backing buffer, whichever group has them.

    Attributes:
        blocks: ``[blocks, pages, words]`` int32.
        slot_position: ``[blocks, block_size]`` int32, positions of the keys in each block.
    """

    def __init__(self, blocks: torch.Tensor, slot_position: torch.Tensor) -> None:
        self.blocks = blocks
        self.slot_position = slot_position.view(len(blocks), -1)

    def copy(self, pairs: list[tuple[int, int]]) -> None:
        """``(source, destination)`` block ids; no block is both."""
        if not pairs:
            return
        ids = np.fromiter(chain.from_iterable(pairs), np.int32, 2 * len(pairs))
        ids = np.ascontiguousarray(ids.reshape(-1, 2).T)
        ids = async_tensor_h2d(ids, device=self.blocks.device)
        copy_blocks(self.blocks, self.slot_position, ids)


class Continuations:
    """Of a worker's requests those that go on from a snapshot, and what is known of those that left
    one."""

    def __init__(self, num_stages: int) -> None:
        self._none = np.zeros(num_stages, np.int32)
        self._num_tokens: dict[str, int] = {}
        # By stage, the prompt tokens that had keys when a request went on, and slot less position
        # of tokens that run behind what it goes on from.
        self._had: dict[str, np.ndarray] = {}
        self._shifts: dict[str, np.ndarray] = {}
        # By request, the first block in the prompt's group; by that block, what its last request
        # left in the request table. It is a snapshot's as long as nobody else has the block.
        self._blocks: dict[str, int] = {}
        self._rows: dict[int, RequestRow] = {}
        self._copies: dict[int, RowCopy] = {}

    def __contains__(self, req_id: str) -> bool:
        return req_id in self._shifts

    def begin(self, req_id: str, continuation: Continuation) -> tuple[RequestPlan, tuple[int, ...]]:
        """A request goes on. Returns its plan, and how many prompt tokens have keys in each stage
        once its own have run. Waits only for a request that left its snapshot a moment ago."""
        block = continuation.prompt_block
        if block in self._copies:
            self._rows[block] = self._copies.pop(block).read()
        row, plan = self._rows[block], continuation.plan
        self._num_tokens[req_id] = continuation.num_tokens
        had = self._had[req_id] = keys = np.array(row.prompt_keys, np.int32)
        if plan is None:
            plan = row.plan
        else:
            keys = had + np.subtract(plan.kept, row.kept, dtype=np.int32)
        self._shifts[req_id] = keys - plan.num_prompt
        return plan, tuple(keys.tolist())

    def note(self, req_id: str, num_tokens: int) -> None:
        """A request has so many tokens of prompts that were not pruned, and is not pruned either;
        else nothing is told of it here."""
        self._num_tokens[req_id] = num_tokens

    def may_leave(self, req_id: str, prompt_block: int) -> None:
        """A request may leave a snapshot whose first block in the prompt's group is this."""
        self._blocks[req_id] = prompt_block

    def end(self, req_id: str, row: torch.Tensor) -> None:
        """``row``: as ``RequestTable.row`` gives it."""
        for of_request in (self._num_tokens, self._had, self._shifts):
            of_request.pop(req_id, None)
        block = self._blocks.pop(req_id, None)
        if block is None:
            return
        for at in [at for at, copy in self._copies.items() if copy.is_here]:
            self._rows[at] = self._copies.pop(at).read()
        self._copies[block] = RowCopy(row)

    def reused(self, req_id: str) -> int:
        """Tokens that a request had when it began; 0: it does not go on."""
        return self._num_tokens.get(req_id, 0)

    def revivable(self, req_id: str, plan: RequestPlan, most: int) -> list[int]:
        """By stage, how many tokens a request's turn revives: ``most``, but for what it has room
        for and what was dropped."""
        had, now = self._had[req_id].tolist(), (self._shifts[req_id] + plan.num_prompt).tolist()
        counts = [0]
        for stage in range(1, len(had)):
            dropped = had[stage - 1] + counts[-1] - had[stage]
            counts.append(max(min(most, plan.capacity[stage] - now[stage], dropped), 0))
        return counts

    def before(self, req_ids: list[str], plans: list[RequestPlan]) -> np.ndarray:
        """``[stages, requests]`` int32: slots before those of the tokens that long turns choose; 0
        for others."""
        turns = [plan.long_turn for plan in plans]
        slots = [
            self._none if turn is None else self._had[req_id] + turn.first - turn.begin
            for req_id, turn in zip(req_ids, turns)
        ]
        return np.array(slots, np.int32).reshape(-1, len(self._none)).T

    def shift(self, req_ids: list[str]) -> np.ndarray:
        """``[stages, requests]`` int32: slot less position of tokens that run behind what a request
        goes on from; 0 for others."""
        shifts = [self._shifts.get(req_id, self._none) for req_id in req_ids]
        return np.array(shifts, np.int32).reshape(-1, len(self._none)).T
