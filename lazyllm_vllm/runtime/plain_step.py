"""A step whose rows are in every stage those that vLLM gives: prompts that are not pruned, from
their first token on, alone or beside decodes of such.

A token's slot is its position there in every stage, so that positions, slots and bounds are those
that vLLM has made. Nothing is planned and nothing goes to the device but what decodes ask for, and
a boundary only notes what is where.
"""

from collections.abc import Sequence

import torch

from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.prefill_rows import RowPlan
from lazyllm_vllm.runtime.step import Batch, Step
from lazyllm_vllm.runtime.step_kind import StepKind


class PlainStep(Step):
    """See ``Step``."""

    is_plain = True

    def __init__(
        self,
        batch: Batch,
        lengths: Sequence[int],
        starts: torch.Tensor,
        schedule: Schedule,
        buffers: StepBuffers,
    ) -> None:
        """Args:
        batch: ``prefills`` is None.
        lengths: tokens of each prefill, one or more.
        starts: ``[requests + 1]`` int32, first row of each request, and the number of rows.
        """
        self.kind = StepKind.RUN
        self.batch = batch
        self.schedule = schedule
        self.buffers = buffers
        self.rows = buffers.rows
        self.is_part = False
        self.num_decodes = self.first_prefill = n = batch.num_decodes
        self.num_prefills = len(lengths)
        self.num_requests = n + self.num_prefills
        self.decodes_select = self.prefills_select = self.revives = False
        self.revive_rows = self.max_revived = self.num_turns = self.turn_quota = 0
        self.lists = 1
        self.decode_schedules = {}
        stages = schedule.num_stages
        self.plan = RowPlan([], [[]] * stages, [])
        self.longest_prefill = [max(lengths)] * stages
        self._num_prefill_rows = [sum(lengths)] * stages
        start = starts[n:] - n if n else starts
        none = buffers.decode_starts[:1].expand(self.num_prefills)  # zeros
        self.segments = [Segments(start, n, none, none)] * stages

    @property
    def drops_nothing(self) -> bool:
        return True

    def prefills_score(self, stage: int) -> bool:
        return False

    def continues(self, stage: int) -> bool:
        return False

    def positions(self, stage: int) -> torch.Tensor:
        return self.batch.positions

    def slot_mappings(self, stage: int) -> torch.Tensor:
        return self.batch.slot_mappings

    def query_row(self, stage: int) -> torch.Tensor:
        """As in ``Step``, but int64: what is sampled from is each request's last row."""
        return self.batch.sampled_tokens
