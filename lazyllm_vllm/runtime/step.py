"""The plan of one forward pass, made on the CPU.

Rows of stage s, in order: ``[decodes | revived | prefill tokens]``. Stage 0 revives nothing. The
numbers of decode and prefill rows are known on the CPU; which rows are used, and by which token,
only on the GPU. A decode batch in a CUDA graph is padded with requests of index -1.
"""

from dataclasses import dataclass
from enum import Enum, auto

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.kernels.selection import Segments
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers


class StepKind(Enum):
    """What a step is for."""

    RUN = auto()  # requests, run now or in graph pieces
    REPLAY = auto()  # requests that replay a full CUDA graph: it has a plan already
    CAPTURE = auto()  # recorded in a full CUDA graph
    CAPTURE_SELECTING = auto()  # the same, with selection and revival
    DUMMY = auto()  # recorded in graph pieces, or made up by vLLM
    WARM_UP = auto()  # made up to run all that there is once

    @property
    def has_requests(self) -> bool:
        return self in (StepKind.RUN, StepKind.REPLAY)

    @property
    def is_in_full_graph(self) -> bool:
        return self in (StepKind.REPLAY, StepKind.CAPTURE, StepKind.CAPTURE_SELECTING)

    @property
    def is_recorded(self) -> bool:
        """Whether a CUDA graph records the step, or is readied for it."""
        return self in (StepKind.CAPTURE, StepKind.CAPTURE_SELECTING, StepKind.DUMMY)


@dataclass(frozen=True)
class Batch:
    """What a step computes.

    Attributes:
        req_ids: the requests, decodes first.
        num_decodes: requests with one row (padding included).
        prefill_rows: rows of each prefill in each stage, ``[stages, prefills]`` int32.
        positions: ``[rows of stage 0]`` int64.
        sampled_tokens: ``[requests]``, where vLLM looks for the rows that it samples from.
        slot_mappings: vLLM's, ``[groups, rows]`` int64, which stage 0 uses.
        wants_all_rows: whether the caller reads the hidden state of every prompt token.
    """

    req_ids: list[str]
    num_decodes: int
    prefill_rows: np.ndarray
    positions: torch.Tensor
    sampled_tokens: torch.Tensor
    slot_mappings: torch.Tensor
    wants_all_rows: bool = False


class Step:
    """Attributes:
    decodes_select, prefills_select: whether boundaries select anew for decodes, for prefills.
    revives: whether decodes may revive, and rows are set aside for it.
    segments: the prefills' rows in each stage.
    lists: lists that decodes search, see ``kernels.top_k``: two where they may revive.
    decode_schedules: how FlashAttention shares decodes among programs, by stage and window.
    """

    def __init__(
        self, kind: StepKind, batch: Batch, schedule: Schedule, buffers: StepBuffers, selects: bool
    ) -> None:
        self.kind = kind
        self.batch = batch
        self.schedule = schedule
        self.num_decodes = n = batch.num_decodes
        self.num_prefills = batch.prefill_rows.shape[1]
        self.num_requests = n + self.num_prefills
        self.decodes_select = selects
        rows = batch.prefill_rows
        self.prefills_select = kind is StepKind.WARM_UP or bool((rows[-1] < rows[0]).any())
        self.revives = selects and buffers.aux is not None
        self.revive_rows = schedule.revive_rows(n) if self.revives else 0
        self.max_revived = schedule.largest_quota(n) if self.revives else 0
        self.lists = 2 if self.revives else 1
        self.decode_schedules: dict[tuple[int, int | None], torch.Tensor] = {}
        self._window_rows: dict[int, torch.Tensor] = {}
        self._prefill_rows = [int(count) for count in rows.sum(1)]
        if self.num_prefills:
            self.longest_prefill = [int(count) for count in rows.max(1)]
            self.segments, self._query_rows = self._upload(buffers)
        else:
            self.segments = [buffers.no_prefills] * schedule.num_stages
            self._query_rows = [buffers.decode_starts] * schedule.num_stages

    def _upload(self, buffers: StepBuffers) -> tuple[list[Segments], list[torch.Tensor]]:
        """The prefills' bounds in each stage and all current rows, in one copy to the device."""
        lens, n, stages = self.batch.prefill_rows, self.num_decodes, self.schedule.num_stages
        starts = np.zeros((stages, self.num_prefills + 1), np.int32)
        np.cumsum(lens, axis=1, out=starts[:, 1:])
        bases = np.array([self.num_decode_rows(s) for s in range(stages)], np.int32)
        packed = np.concatenate([starts, lens, bases[:, None] + starts[:, 1:] - 1], 1)
        packed = async_tensor_h2d(packed.astype(np.int32), device=buffers.device)
        widths = [self.num_prefills + 1, self.num_prefills, self.num_prefills]
        starts, lens, last_rows = packed.split(widths, 1)
        mine = slice(n, self.num_requests)
        buffers.all_rows.num_keys[:, mine] = lens
        buffers.query_rows[:, mine] = last_rows
        if n:
            buffers.query_rows[:, :n] = buffers.decode_starts[:n]
        segments = [Segments(start, int(base)) for start, base in zip(starts.contiguous(), bases)]
        return segments, list(buffers.query_rows)

    @property
    def drops_nothing(self) -> bool:
        """Whether every row goes on over every boundary, in the same order."""
        return not (self.prefills_select or self.revives)

    @property
    def decodes(self) -> range:
        """Batch indices."""
        return range(self.num_decodes)

    @property
    def prefills(self) -> range:
        """Batch indices."""
        return range(self.num_decodes, self.num_requests)

    def num_decode_rows(self, stage: int) -> int:
        """Current and revived rows."""
        return self.num_decodes + (self.revive_rows if stage else 0)

    def num_rows(self, stage: int) -> int:
        return self.num_decode_rows(stage) + self._prefill_rows[stage]

    def query_row(self, stage: int) -> torch.Tensor:
        """``[batch]`` int32, each request's current row."""
        return self._query_rows[stage]

    def window_rows(self, stage: int, window: int) -> torch.Tensor:
        """``[window, prefills]`` int64, each prefill's last rows in the stage, the last one first,
        counted from the first prefill's. Prompts that are shorter are not scored."""
        if stage not in self._window_rows:
            start = self.segments[stage].start
            back = torch.arange(1, window + 1, device=start.device)
            self._window_rows[stage] = (start[1:] - back[:, None]).clamp(min=0)
        return self._window_rows[stage]
