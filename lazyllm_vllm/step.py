"""One engine step: the rows of each stage, and what happens at a boundary.

Rows of stage s, in order: ``[decodes | revived | prefill tokens]``. Stage 0 revives nothing. The
counts of decode and prefill rows are known on the CPU; which rows are used, and by which token,
only on the GPU. A decode batch in a CUDA graph is padded with requests of index -1.
"""

from dataclasses import dataclass, field

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.kernels.gather import AuxPages, load_aux, move_prefill_rows, store_aux
from lazyllm_vllm.kernels.rank import rank_tokens
from lazyllm_vllm.kernels.rows import begin_step, place_rows
from lazyllm_vllm.kernels.select_decode import select_decode
from lazyllm_vllm.kernels.select_prefill import select_prefill
from lazyllm_vllm.kernels.state import PrefillMove, Rows, Selection
from lazyllm_vllm.kernels.top_k import BINS, MAX_SPLITS, NUM_COUNTS
from lazyllm_vllm.request_table import RequestTable
from lazyllm_vllm.schedule import Schedule
from lazyllm_vllm.trace import Trace


class StepBuffers:
    """Everything a step writes that outlives it or that a CUDA graph must find again. One owner.

    By batch index, ``max_num_reqs`` long: ``req_index`` int32 (row of the request table, -1:
    none); ``lse`` ``[score_window, batch, heads]`` fp32 of the current row and, in a prefill, of
    those before it; and what ``Selection`` holds by batch index. By stage: ``rows``. By KV cache
    group: ``slot_mappings``. ``share`` ``[1]`` int32: most tokens that a request may revive at a
    boundary of this step.

    By physical slot, once the KV cache exists: ``level`` int8, ``selected`` int8, ``token_score``
    fp32 and ``token_key`` int32 at a prompt position's slot in stage 0; ``slot_position`` int32 at
    a key's slot in a later stage.
    """

    def __init__(
        self,
        schedule: Schedule,
        max_num_reqs: int,
        max_num_tokens: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.schedule = schedule
        self.device = device
        self.max_rows = max_num_tokens + schedule.config.revive_budget
        stages = schedule.num_stages
        ints = {"dtype": torch.int32, "device": device}
        self.req_index = torch.full((max_num_reqs,), -1, **ints)
        self.num_prompt = torch.zeros(max_num_reqs, **ints)
        self.is_pruned = torch.zeros(max_num_reqs, **ints)
        self.active = torch.zeros(stages, max_num_reqs, **ints)
        self.limit = torch.zeros(stages, max_num_reqs, **ints)
        self.histogram = torch.zeros(max_num_reqs, 2 * BINS, **ints)
        self.found = torch.zeros(max_num_reqs, 4, **ints)
        self.counts = torch.zeros(max_num_reqs, NUM_COUNTS, MAX_SPLITS, **ints)
        self.share = torch.zeros(1, **ints)
        lse_shape = (schedule.config.score_window, max_num_reqs, num_heads)
        self.lse = torch.zeros(lse_shape, dtype=torch.float32, device=device)
        self.decode_starts = torch.arange(max_num_reqs + 1, **ints)
        self.query_rows = torch.zeros(stages, max_num_reqs, **ints)
        self.dst_row = torch.zeros(self.max_rows, **ints)
        self.src_request = torch.zeros(self.max_rows, **ints)
        self.all_rows = Rows(
            position=torch.zeros(stages, self.max_rows, dtype=torch.int64, device=device),
            request=torch.full((stages, self.max_rows), -1, **ints),
            slot=torch.zeros(stages, self.max_rows, **ints),
            key_len=torch.zeros(stages, max_num_reqs, **ints),
            num_revived=torch.zeros(stages, max_num_reqs, **ints),
        )
        self.rows = [self.all_rows.of_stage(stage) for stage in range(stages)]

    def attach_kv_cache(self, num_blocks: int, block_size: int, num_groups: int) -> None:
        """Make what is kept by physical slot; called whenever vLLM makes a KV cache."""
        slots = num_blocks * block_size
        self.block_size = block_size
        self.level = torch.zeros(slots, dtype=torch.int8, device=self.device)
        self.selected = torch.zeros(slots, dtype=torch.int8, device=self.device)
        self.token_score = torch.zeros(slots, dtype=torch.float32, device=self.device)
        self.token_key = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.slot_position = torch.zeros(slots, dtype=torch.int32, device=self.device)
        self.slot_mappings = torch.full(
            (num_groups, self.max_rows), -1, dtype=torch.int64, device=self.device
        )


@dataclass
class Step:
    """The plan of one forward pass, made on the CPU by ``LazyModelState.prepare_attn``.

    Attributes:
        block_tables: one a KV cache group, ``[batch, width]`` int32.
        stage_groups: KV cache groups of each stage.
        slot_mapping_0: vLLM's slot mappings, ``[groups, rows]`` int64, used in stage 0.
        num_decodes: requests with one row, first in the batch (padding included).
        prefill_lens: tokens of each prefill in each stage, ``[stages, prefills]``.
        decodes_select, prefills_select: whether boundaries select anew for decodes, for prefills.
        revives: whether decodes may revive (rows are set aside for it).
        recorded: whether the step is recorded in a CUDA graph, or readies one.
        max_splits: programs that FlashAttention may share a decode's keys among; 0: its choice.
        sampled_tokens: ``[requests]``, where vLLM looks for the rows that it samples from.
        req_ids: the requests, in batch order.
        trace: told of every boundary, in debugging; else None.
    """

    schedule: Schedule
    buffers: StepBuffers
    table: RequestTable
    block_tables: tuple[torch.Tensor, ...]
    stage_groups: list[list[int]]
    slot_mapping_0: torch.Tensor
    aux: AuxPages | None
    num_decodes: int
    prefill_lens: np.ndarray
    decodes_select: bool
    prefills_select: bool
    revives: bool
    recorded: bool
    max_splits: int
    sampled_tokens: torch.Tensor
    req_ids: list[str]
    trace: Trace | None = None
    prefill_starts: list[torch.Tensor] = field(init=False)
    max_prefill_rows: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.num_prefills = self.prefill_lens.shape[1]
        self.num_requests = self.num_decodes + self.num_prefills
        self.strict = self.schedule.config.decode == "strict"
        self.position_table = self.block_tables[self.stage_groups[0][0]]
        self._prefill_rows = [int(n) for n in self.prefill_lens.sum(1)]
        self.revive_rows = self.max_revived = 0
        if self.revives:
            self.revive_rows = self.schedule.revive_rows(self.num_decodes)
            self.max_revived = self.schedule.largest_share(self.num_decodes)
        # Decodes search two lists where they may revive; see kernels.top_k.
        self._lists = 2 if self.revives else 1
        self._marks = self.strict or self.trace is not None
        self.decode_schedules: dict[int, torch.Tensor] = {}
        if self.num_prefills:
            self._upload_prefills()

    def _upload_prefills(self) -> None:
        """Row bounds of the prefills in each stage, in one copy to the device."""
        stages = self.schedule.num_stages
        starts = np.zeros((stages, self.num_prefills + 1), np.int32)
        np.cumsum(self.prefill_lens, axis=1, out=starts[:, 1:])
        first = np.array([self.num_decode_rows(s) for s in range(stages)], np.int32)
        packed = np.concatenate([starts, self.prefill_lens, first[:, None] + starts[:, 1:] - 1], 1)
        packed = async_tensor_h2d(packed.astype(np.int32), device=self.buffers.device)
        self.prefill_starts = list(packed[:, : self.num_prefills + 1].contiguous())
        self.max_prefill_rows = [int(n) for n in self.prefill_lens.max(1)]
        mine = slice(self.num_decodes, self.num_requests)
        lens, last_rows = packed[:, self.num_prefills + 1 :].split(self.num_prefills, 1)
        self.buffers.all_rows.key_len[:, mine] = lens
        self.buffers.query_rows[:, mine] = last_rows
        if self.num_decodes:
            self.buffers.query_rows[:, : self.num_decodes] = self.buffers.decode_starts[
                : self.num_decodes
            ]

    def num_decode_rows(self, stage: int) -> int:
        """Current and revived rows."""
        return self.num_decodes + (self.revive_rows if stage else 0)

    def num_prefill_rows(self, stage: int) -> int:
        return self._prefill_rows[stage]

    def num_rows(self, stage: int) -> int:
        return self.num_decode_rows(stage) + self._prefill_rows[stage]

    def key_len(self, stage: int) -> torch.Tensor:
        """``[batch]`` int32."""
        return self.buffers.rows[stage].key_len

    def query_row(self, stage: int) -> torch.Tensor:
        """``[batch]`` int32, each request's current row; decodes come first in every stage."""
        return self.buffers.query_rows[stage] if self.num_prefills else self.buffers.decode_starts

    def row_position(self, stage: int) -> torch.Tensor:
        """``[rows]`` int64."""
        return self._positions if stage == 0 else self.buffers.rows[stage].position

    def slot_mapping(self, group: int) -> torch.Tensor:
        """``[rows]`` int64, where the group's layers write keys and values."""
        if group in self.stage_groups[0]:
            return self.slot_mapping_0[group]
        return self.buffers.slot_mappings[group]

    def begin(self, positions: torch.Tensor) -> None:
        """Start the step; ``positions`` is ``[rows]`` int64 of stage 0."""
        b = self.buffers
        self._stage = 0
        self._positions = positions
        self.selection = Selection(
            token_key=b.token_key, token_score=b.token_score, level=b.level, selected=b.selected,
            position_table=self.position_table, table=self.table.gpu, req_index=b.req_index,
            num_prompt=b.num_prompt, is_pruned=b.is_pruned, active=b.active, limit=b.limit,
            histogram=b.histogram, found=b.found, counts=b.counts, block_size=b.block_size,
        )  # fmt: skip
        begin_step(
            self.selection, b.all_rows, positions, b.share, self.num_decodes, self.num_requests,
            self.revive_rows, self.decodes_select and self._marks, self.schedule.num_stages,
        )  # fmt: skip
        if self.trace:
            self.trace.begin(self)

    def cross(
        self, stage: int, hidden: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """Carry hidden states over the boundary into ``stage``: score (done by the last layer's
        attention), rank, select, gather.

        Args:
            hidden, residual: ``[rows of stage - 1, hidden]``, what the layers hand on.

        Returns:
            The same for the rows of ``stage``, and their positions, int64.
        """
        rows = self.buffers.rows[stage]
        move = self._choose_rows(stage)
        positions = rows.position[: self.num_rows(stage)]
        if not (self.revives or self.prefills_select):
            return hidden, residual, positions  # every row goes on, in the same order
        return self._gather(stage, rows, move, hidden + residual), None, positions

    def enter(self, stage: int) -> None:
        """Tell the rows of ``stage``, which must be those of the one before, their places in it,
        unless they were carried there by ``cross``."""
        if stage > self._stage:
            assert not (self.decodes_select or self.prefills_select)
            self._choose_rows(stage)

    def _choose_rows(self, stage: int) -> PrefillMove | None:
        self._stage = stage
        rows = self.buffers.rows[stage]
        self._rank(stage)
        move = self._select_prefills(stage, rows) if self.num_prefills else None
        if self.num_decodes and self.decodes_select:
            select_decode(
                self.selection, rows, self.buffers.share, self.num_decodes, stage,
                self.schedule.num_stages, self._lists, self._marks,
            )  # fmt: skip
        for group in self.stage_groups[stage]:
            place_rows(
                self.buffers.slot_mappings[group], self.buffers.slot_position, rows,
                self.block_tables[group], self.num_rows(stage), self.buffers.block_size,
            )  # fmt: skip
        if self.trace:
            self.trace.boundary(self, stage)
        return move

    def _rank(self, stage: int) -> None:
        config = self.schedule.config
        common = (config.score_pool, config.first_tokens, config.last_tokens)
        first, second = self.num_decodes, self.num_prefills
        if first and self.decodes_select:
            rank_tokens(self.selection, 0, first, stage, self._lists, self.strict, *common)
        if second and self.prefills_select:
            rank_tokens(self.selection, first, second, stage, 1, False, *common)

    def _select_prefills(self, stage: int, rows: Rows) -> PrefillMove:
        before = self._positions if stage == 1 else self.buffers.rows[stage - 1].position
        move = PrefillMove(
            start=self.prefill_starts[stage - 1],
            dst_start=self.prefill_starts[stage],
            base=self.num_decode_rows(stage - 1),
            dst_base=self.num_decode_rows(stage),
            position=before,
            dst_row=self.buffers.dst_row,
            request=self.buffers.src_request,
        )
        select_prefill(self.selection, rows, move, self.num_decodes, stage, self.prefills_select)
        return move

    def _gather(
        self, stage: int, rows: Rows, move: PrefillMove | None, hidden: torch.Tensor
    ) -> torch.Tensor:
        out = hidden.new_empty(self.num_rows(stage), hidden.shape[1])
        if self.revives:
            if stage > 1:
                # States revived into the stage before go by way of the Aux Cache, so that those
                # not revived again are found there later, newer than they were.
                before = self.buffers.rows[stage - 1]
                store_aux(hidden, before, self.num_decodes, self.revive_rows, self.aux)
            load_aux(out, hidden, rows, self.num_decodes, self.num_decode_rows(stage), self.aux)
        else:
            out[: self.num_decodes] = hidden[: self.num_decodes]
        if move is not None:
            move_prefill_rows(
                out, hidden, move, self.num_decode_rows(stage - 1),
                self.num_prefill_rows(stage - 1), self.aux,
            )  # fmt: skip
        return out

    def current_rows(self) -> torch.Tensor | slice:
        """Rows of the last stage that are sampled from: decodes, then each prefill's last."""
        last = self.schedule.num_stages - 1
        if not self.num_prefills:
            return slice(0, self.num_decodes)
        return self.buffers.query_rows[last, : self.num_requests]
