"""A step whose rows are in every stage those that vLLM gives: prompts that are not pruned, whose
earlier tokens have keys in all stages, alone or beside decodes of such.

A token's slot is its position there in every stage, so that positions, slots and bounds are those
that vLLM has made. Nothing is planned and nothing goes to the device but what decodes ask for, and
a boundary only notes what is where.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import torch

from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.prefill_rows import RowPlan
from lazyllm_vllm.runtime.step import Batch, Step
from lazyllm_vllm.runtime.step_kind import StepKind


class Chunks(NamedTuple):
    """The prefills of a step.

    Attributes:
        first: of each, tokens that ran before; lengths: tokens that run, one or more.
        starts: ``[requests + 1]`` int32, first row of each request, and the number of rows.
        num_keys: ``[requests]`` int32, keys of each request after this step.
    """

    first: Sequence[int]
    lengths: Sequence[int]
    starts: torch.Tensor
    num_keys: torch.Tensor


class PlainStep(Step):
    """See ``Step``."""

    is_plain = True

    def __init__(
        self, batch: Batch, chunks: Chunks, schedule: Schedule, buffers: StepBuffers
    ) -> None:
        """``batch``: ``prefills`` is None."""
        self.kind = StepKind.RUN
        self.batch = batch
        self.schedule = schedule
        self.buffers = buffers
        self.rows = buffers.rows
        self.is_part = False
        self.num_decodes = self.first_prefill = n = batch.num_decodes
        self.num_prefills = len(chunks.lengths)
        self.num_requests = n + self.num_prefills
        self.decodes_select = self.prefills_select = self.revives = False
        self.revive_rows = self.max_revived = self.num_turns = self.turn_quota = 0
        self.lists = 1
        self.decode_schedules = {}
        stages = schedule.num_stages
        self.plan = RowPlan([], [[]] * stages, [])
        self.longest_prefill = self.longest_request = [max(chunks.lengths)] * stages
        self._num_prefill_rows = [sum(chunks.lengths)] * stages
        start = chunks.starts[n:] - n if n else chunks.starts
        none = buffers.decode_starts[:1].expand(self.num_prefills)  # zeros
        self._goes_on = any(chunks.first)
        first = none
        if self._goes_on:
            keys = [before + new for before, new in zip(chunks.first, chunks.lengths)]
            pairs = sum(new * all_keys for new, all_keys in zip(chunks.lengths, keys))
            self.longest_keys, self.num_keys = [max(keys)] * stages, [sum(keys)] * stages
            self.num_pairs, self.row_starts = [pairs] * stages, [chunks.starts] * stages
            num_keys = chunks.num_keys[n : self.num_requests]
            first = num_keys - start.diff()
            buffers.all_rows.num_keys[:, n : self.num_requests] = num_keys
        self.segments = [Segments(start, n, first, none)] * stages

    @cached_property
    def key_starts(self) -> list[torch.Tensor]:
        """By stage, ``[prefills + 1]`` int32, the first key of each of those that go on, where all
        their keys are side by side."""
        num_keys = self.buffers.all_rows.num_keys[0, self.first_prefill : self.num_requests]
        starts = num_keys.new_zeros(self.num_prefills + 1)
        torch.cumsum(num_keys, 0, dtype=torch.int32, out=starts[1:])
        return [starts] * self.schedule.num_stages

    @property
    def drops_nothing(self) -> bool:
        return True

    @property
    def is_shifted(self) -> bool:
        return False

    def prefills_score(self, stage: int) -> bool:
        return False

    def continues(self, stage: int) -> bool:
        return self._goes_on

    def positions(self, stage: int) -> torch.Tensor:
        return self.batch.positions

    def slot_mappings(self, stage: int) -> torch.Tensor:
        return self.batch.slot_mappings

    def query_row(self, stage: int) -> torch.Tensor:
        """As in ``Step``, but int64: what is sampled from is each request's last row."""
        return self.batch.sampled_tokens
