"""The plan of one forward pass, made on the CPU.

Rows of stage s, in order: ``[decodes | revived | prefill tokens]``. Stage 0 revives nothing. The
numbers of decode and prefill rows are known on the CPU; which rows are used, and by which token,
only on the GPU. A decode batch in a CUDA graph is padded with requests of index -1. Prefill rows
that run before the others (``prefill_rows``) make a step of their own, a part of the step.
"""

from copy import copy
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.prefill_rows import Prefills, RowPlan, Span
from lazyllm_vllm.runtime.step_kind import StepKind
from lazyllm_vllm.runtime.turns import Turns, TurnShape


@dataclass(frozen=True)
class Batch:
    """What a step computes.

    Attributes:
        req_ids: the requests, decodes first.
        num_decodes: requests that decode (padding included).
        prefills: the others; None in a ``PlainStep``.
        positions: ``[rows of stage 0]`` int64.
        sampled_tokens: ``[requests]``, where vLLM looks for the rows that it samples from.
        slot_mappings: vLLM's, ``[groups, rows]`` int64, which stage 0 uses.
        wants_all_rows: whether the caller reads the hidden state of every prompt token.
        pruned_tokens: tokens of the requests' prompts that are pruned; None: not known, or there is
            one rank alone, which does not ask.
        turns: whose last tokens are the first decodes; None: rows and requests are as vLLM's.
    """

    req_ids: list[str]
    num_decodes: int
    prefills: Prefills | None
    positions: torch.Tensor
    sampled_tokens: torch.Tensor
    slot_mappings: torch.Tensor
    wants_all_rows: bool = False
    pruned_tokens: int | None = None
    turns: Turns | None = None

    @property
    def shape(self) -> TurnShape | None:
        """As which it is padded; None: it is not."""
        return self.turns and self.turns.shape


class Step:
    """Attributes:
    is_plain: whether all stages run the rows that vLLM gives; see ``plain_step``.
    spans: the prefills' rows in each stage.
    rows: what the kernels are told of the rows of each stage.
    is_part: whether this is a part of a step: no decodes, and nothing is sampled.
    searched: the stages for which the prefills' best tokens have been found.
    num_turns: of the decodes those that are the last tokens of turns, the first ones; turn_quota:
        rows set aside for what each revives.
    first_prefill: batch index of the first prefill.
    decodes_select, prefills_select: whether boundaries select anew for decodes, for prefills.
    revives: whether decodes may revive, and rows are set aside for it.
    segments: the prefills' rows in each stage.
    row_starts: by stage, ``[requests + 1]`` int32, first row of each request, of stages in which
        nothing is revived; longest_request: most rows of one.
    uploaded: int32, all of the step's own numbers on the device; a graph reads them there.
    longest_prefill, longest_keys: most rows, and most keys, of a prefill in each stage; num_keys:
        keys of all prefills; num_pairs: of a row and a key, the uncausal ones counted too.
    lists: lists that decodes search, see ``kernels.top_k``: two where they may revive.
    decode_schedules: how FlashAttention shares decodes among programs, by stage and window.
    """

    is_plain = False

    def __init__(
        self, kind: StepKind, batch: Batch, schedule: Schedule, buffers: StepBuffers, selects: bool
    ) -> None:
        self.kind = kind
        self.batch = batch
        self.schedule = schedule
        self.buffers = buffers
        self._make_plan()
        self.rows = buffers.rows
        self.is_part = False
        self.searched: set[int] = set()
        self.num_decodes = n = batch.num_decodes
        self.num_turns = len(batch.turns.tokens) if batch.turns else 0
        self.first_prefill = n
        self.decodes_select = selects
        self.prefills_select = kind is StepKind.WARM_UP or bool(batch.prefills.prunes.any())
        self.revives = selects and schedule.has_aux
        self.turn_quota = self.revive_rows = self.max_revived = 0
        if self.revives and self.num_turns:
            self.turn_quota = schedule.turn_quota
            self.revive_rows = self.num_turns * self.turn_quota
        if self.revives and n > self.num_turns:
            self.revive_rows += schedule.revive_rows(n - self.num_turns)
            self.max_revived = schedule.largest_quota(n - self.num_turns)
        self.max_revived = max(self.max_revived, self.turn_quota)
        self.lists = 2 if self.revives else 1
        self._place_prefills(self.plan.spans)
        self.window_part = buffers.window_parts
        self._scores = self._upload_window()

    def _make_plan(self) -> None:
        window = self.schedule.config.score_window
        batch, budget = self.batch, self.buffers.budget
        self.plan = RowPlan.make(batch.prefills, batch.num_decodes, budget, window)
        if shape := batch.shape:
            # A turn's last token is a decode behind stage 0. What ran there before is less still.
            later = [shape.rows - 1] * (self.schedule.num_stages - 1)
            self.plan = self.plan.padded([shape.rows, *later])

    def replan(self, stage: int, kept: list[int]) -> None:
        """Go on from the boundary before ``stage`` with so many tokens of each prefill kept in it,
        and no more in later stages. Stages that have run stay as they were."""
        prefills = self.batch.prefills
        counts = prefills.kept.copy()
        counts[stage:] = np.minimum(counts[stage:], kept)
        self.batch = replace(self.batch, prefills=replace(prefills, kept=counts))
        self._make_plan()
        self._place_prefills(self.plan.spans)

    def part(self, span: Span) -> "Step":
        """Prefill rows alone, the same in every stage. Until ``show`` is called kernels see no
        others."""
        part = copy(self)
        part.is_part = True
        part.rows = self.buffers.part_rows
        part.num_decodes = part.num_turns = 0
        part.turn_quota = part.revive_rows = part.max_revived = 0
        part.revives = part.decodes_select = False
        part._place_prefills([span] * self.schedule.num_stages)
        return part

    def _place_prefills(self, spans: list[Span]) -> None:
        buffers = self.buffers
        self.spans = spans
        self.num_prefills = len(spans[0].first)
        self.num_requests = self.first_prefill + self.num_prefills
        self.decode_schedules: dict[tuple[int, int | None], torch.Tensor] = {}
        self._window_rows: dict[int, torch.Tensor] = {}
        self._num_prefill_rows = [span.num_rows for span in spans]
        self._continues = [bool(span.first[span.lengths > 0].any()) for span in spans]
        if not self.num_prefills:
            self.segments = [buffers.no_prefills] * self.schedule.num_stages
            self._query_rows = [buffers.decode_starts] * self.schedule.num_stages
            return
        self.longest_prefill = [int(span.lengths.max()) for span in spans]
        self.longest_keys = [int(span.num_keys.max()) for span in spans]
        self.num_keys = [int(span.num_keys.sum()) for span in spans]
        self.num_pairs = [int((span.lengths.astype(int) * span.end).sum()) for span in spans]
        self._upload()
        self.show()

    def _upload(self) -> None:
        """The prefills' bounds in each stage and all current rows, in one copy to the device."""
        count, stages = self.num_prefills, self.schedule.num_stages
        names = ("first", "end", "num_keys")
        first, end, keys = (np.stack([getattr(s, name) for s in self.spans]) for name in names)
        starts, key_starts = np.zeros((2, stages, count + 1), np.int32)
        np.cumsum(end - first, axis=1, out=starts[:, 1:])
        np.cumsum(keys, axis=1, out=key_starts[:, 1:])
        bases = np.array([self.num_decode_rows(s) for s in range(stages)], np.int32)
        # Of a prefill that has no row in a stage some row, which nobody reads.
        last_rows = np.maximum(bases[:, None] + starts[:, 1:] - 1, 0)
        row_starts = self._starts_of_requests(starts)
        self.longest_request = np.diff(row_starts).max(axis=1).tolist()
        parts = (starts, key_starts, first, keys, last_rows, self.batch.prefills.shift, row_starts)
        packed = np.concatenate([part.ravel() for part in parts]).astype(np.int32)
        self.uploaded = async_tensor_h2d(packed, device=self.buffers.device)
        packed = self.uploaded.split([part.size for part in parts])
        starts, self.key_starts, first, self._num_keys, self._last_rows, shift, self.row_starts = (
            part.view(stages, -1) for part in packed
        )
        by_stage = zip(starts, bases.tolist(), first, shift)
        self.segments = [Segments(*of_stage) for of_stage in by_stage]

    def _starts_of_requests(self, starts: np.ndarray) -> np.ndarray:
        """``row_starts``, where nothing is revived. In stage 0 the two prefills of a turn are one,
        the first of no rows."""
        before = np.tile(np.arange(self.num_decodes, dtype=np.int32), (len(starts), 1))
        of_all = np.concatenate([before, self.num_decodes + starts], axis=1)
        if self.batch.turns is not None:
            last = self.num_decodes + np.flatnonzero(self.batch.prefills.sees_revived)
            of_request = self.batch.turns.requests
            last = last[(last > self.num_decodes) & (of_request[last] == of_request[last - 1])]
            of_all[0, last] = of_all[0, last - 1]
        return of_all

    def show(self) -> None:
        """Let kernels see this step's prefill rows, after a part of it has run."""
        b, n = self.buffers, self.first_prefill
        mine = slice(n, self.num_requests)
        b.all_rows.num_keys[:, mine] = self._num_keys
        b.query_rows[:, mine] = self._last_rows
        if self.num_decodes:
            b.query_rows[:, :n] = b.decode_starts[:n]
        self._query_rows = b.query_rows_of

    def _upload_window(self) -> list[bool]:
        """Which of the prefills' tokens score, by stage, and of which prefills boundaries choose
        tokens. Returns whether any scores, by stage."""
        b, p, stages = self.buffers, self.batch.prefills, self.schedule.num_stages
        window = self.schedule.config.score_window
        mine = slice(self.first_prefill, self.num_requests)
        if not (self.num_prefills and (p.is_pruned.any() or p.sees_revived.any())):
            if self.num_prefills:
                b.selection.active[1:, mine] = 0
            return [False] * stages
        packed = np.zeros((4, stages, self.num_prefills), np.int32)
        packed[:3, 0] = p.window_part(window)
        packed[0, 1:] = np.minimum(p.num_prompt, window) * (p.completes[1:] & ~p.leads)
        packed[0, 1:] += (packed[0, 0] - 1) * p.sees_revived  # the last is a decode's row
        packed[1, 1:] += p.sees_revived
        packed[3] = p.crosses
        on_device = async_tensor_h2d(packed, device=b.device)
        b.window[:, :, mine] = on_device[:3]
        b.selection.active[1:, mine] = on_device[3, 1:]
        if p.prunes.any():
            b.choice[:, mine] = async_tensor_h2d(p.choice, device=b.device)
        return packed[0].any(axis=1).tolist()

    def forget(self) -> None:
        """What a forward pass has left for a later one of the same step."""
        self.searched.clear()
        self._window_rows.clear()
        self.decode_schedules.clear()

    @property
    def drops_nothing(self) -> bool:
        """Whether every row goes on over every boundary, in the same order."""
        selects = self.revives or self.prefills_select or self.num_turns
        return self.batch.prefills.runs_alike and not selects

    @property
    def is_shifted(self) -> bool:
        """Whether tokens have other slots than positions, though none are chosen."""
        return bool(self.batch.prefills.shift.any())

    @property
    def decodes(self) -> range:
        """Batch indices."""
        return range(self.num_decodes)

    @property
    def turns(self) -> range:
        """Batch indices of those decodes that are the last tokens of turns."""
        return range(self.num_turns)

    @property
    def prefills(self) -> range:
        """Batch indices."""
        return range(self.first_prefill, self.num_requests)

    def prefills_score(self, stage: int) -> bool:
        """Whether tokens at a prompt's end score the others in this step."""
        is_warm_up = self.kind is StepKind.WARM_UP
        return not self.is_part and (is_warm_up or self._scores[stage])

    def continues(self, stage: int) -> bool:
        """Whether prefill rows attend to keys of rows that ran before them."""
        return self._continues[stage]

    def num_decode_rows(self, stage: int) -> int:
        """Current and revived rows."""
        return self.num_decodes + (self.revive_rows if stage else 0)

    def num_rows(self, stage: int) -> int:
        return self.num_decode_rows(stage) + self._num_prefill_rows[stage]

    def positions(self, stage: int) -> torch.Tensor:
        """Of the stage's rows, ``[rows or more]`` int64."""
        return self.rows[stage].position if stage else self.batch.positions

    def slot_mappings(self, stage: int) -> torch.Tensor:
        """``[groups, rows or more]`` int64, of the stage's groups where keys are written."""
        return self.buffers.slot_mappings if stage else self.batch.slot_mappings

    def query_row(self, stage: int) -> torch.Tensor:
        """``[batch]`` int32, each request's current row."""
        return self._query_rows[stage]

    def window_rows(self, stage: int, window: int) -> torch.Tensor:
        """``[window, prefills]`` int64, each prefill's last rows in the stage, the last one first,
        counted from the first prefill's; of one that has fewer, other rows."""
        if stage not in self._window_rows:
            start = self.segments[stage].start
            back = torch.arange(1, window + 1, device=start.device)
            self._window_rows[stage] = (start[1:] - back[:, None]).clamp(min=0)
        return self._window_rows[stage]
