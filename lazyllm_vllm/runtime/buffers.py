"""The tensors that a step writes and that outlive it, or that a CUDA graph must find again."""

from dataclasses import replace

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.kernels.parked import ParkedStates
from lazyllm_vllm.kernels.prompt_pages import AuxCache, PromptState
from lazyllm_vllm.kernels.queries import WindowPart
from lazyllm_vllm.kernels.rank import rank_of
from lazyllm_vllm.kernels.selection import Choice, PromptCounts, Rows, Segments, Selection
from lazyllm_vllm.kernels.top_k import make_search
from lazyllm_vllm.plan.schedule import TURNS_A_STEP, Schedule
from lazyllm_vllm.runtime.piece_rows import PieceRows
from lazyllm_vllm.runtime.turns import Turns


class StepBuffers:
    """One owner of all of them; nothing here is made during a step.

    Attributes:
        index: ``[max_num_reqs]`` int32, the batch's rows of the request table, -1: no request.
        all_rows: the rows of every stage; ``rows``, the same by stage.
        query_rows: ``[stages, max_num_reqs]`` int32, each request's current row; ``query_rows_of``,
            the same by stage.
        decode_starts: ``[max_num_reqs + 1]`` int32, 0, 1, 2, ...: the current rows of decodes.
        lse: ``[score_window, max_num_reqs, heads]`` fp32, log-denominators of the attention of the
            current row and, in a prefill, of those before it.
        no_prefills: the prefill rows of a step that has none.
        part_rows: by stage, the rows of a part of a step (``Step.part``).
        budget: most rows that run at once, but for what is revived and scores.
        choice: ``[3 + 2 * stages, max_num_reqs]`` int32, of the prefills; see
            ``kernels.selection.Choice``.
        window: ``[3, stages, max_num_reqs]`` int32, the prefills' ``kernels.queries.WindowPart``;
            window_parts, the same by stage; decode_window, that of decodes.

    Once vLLM has made the KV cache (``attach_kv_cache``):
        selection: what the selection kernels are given.
        aux: the Aux Cache, or None: there is one boundary, or none.
        parked: hidden states at the first boundary, or None: no prompt is pruned.
        slot_position: ``[physical slots]`` int32, position of the key in each slot of the later
            stages.
        slot_mappings: ``[groups, rows]`` int64, where a group's layers write keys and values.
        piece_rows: what the pieces of CUDA graphs read of their rows.
    """

    def __init__(
        self,
        schedule: Schedule,
        counts: PromptCounts,
        max_num_tokens: int,
        num_heads: int,
        device: torch.device,
    ) -> None:
        self.counts = counts
        self.device = device
        stages, batch = schedule.num_stages, len(counts.num_prompt)
        self.budget = max_num_tokens
        # With revived tokens, of decodes and of turns.
        self.max_rows = max_num_tokens + schedule.config.revive_budget
        self.max_rows += TURNS_A_STEP * schedule.turn_quota + batch * schedule.config.score_window
        ints = {"dtype": torch.int32, "device": device}
        self.index = torch.full((batch,), -1, **ints)
        self.num_prompt = torch.zeros(batch, **ints)
        self.state_room = torch.zeros(batch, **ints)
        self.choice = torch.zeros(3 + 2 * stages, batch, **ints)
        self.quota = torch.zeros(1, **ints)
        self.first_row = torch.zeros(batch, **ints)
        self.turn_tokens = torch.zeros(batch, **ints)
        self.turn_row = torch.zeros(batch, **ints)
        self.turn_end = torch.zeros(batch, **ints)
        self.turn_limit = torch.zeros(stages, batch, **ints)
        self._shown: tuple[list[int], int] | None = None
        self._quota = 0
        self.query_rows = torch.zeros(stages, batch, **ints)
        self.query_rows_of = list(self.query_rows)
        self.decode_starts = torch.arange(batch + 1, **ints)
        lse_shape = (schedule.config.score_window, batch, num_heads)
        self.lse = torch.zeros(lse_shape, dtype=torch.float32, device=device)
        self.all_rows = Rows.make(stages, self.max_rows, batch, device)
        self.rows = [self.all_rows.of_stage(stage) for stage in range(stages)]
        self.no_prefills = Segments(torch.zeros(1, **ints), 0, *torch.zeros(2, 0, **ints))
        part = Rows.make(1, max_num_tokens, batch, device).of_stage(0)
        self.part_rows = [
            replace(part, num_keys=rows.num_keys, num_revived=rows.num_revived)
            for rows in self.rows
        ]
        self.window = torch.zeros(3, stages, batch, **ints)
        self.window_parts = [WindowPart(*self.window[:, stage]) for stage in range(stages)]
        none = torch.zeros(batch, **ints)
        self.decode_window = WindowPart(torch.ones(batch, **ints), none, none)
        self.search = make_search(batch, device)
        self.least_revived = rank_of(schedule.config.revive_min_score)

    def set_index(self, numbers: list[int], on_device: torch.Tensor, padded: int) -> None:
        """Who is in the batch. Most steps have the requests of the step before: nothing is written.

        Args:
            numbers: rows of the request table; on_device: the same, ``[requests]``.
            padded: requests with those there are not, which fill up a CUDA graph.
        """
        if self._shown == (numbers, padded):
            return
        self._shown = numbers, padded
        if padded > len(numbers):
            self.index[len(numbers) : padded] = -1
        self.index[: len(numbers)] = on_device

    def clear_index(self, padded: int) -> None:
        """Nobody is in a batch of so many."""
        self._shown = None
        self.index[:padded] = -1

    def set_turns(self, turns: Turns) -> None:
        """The turns of a step; see ``Selection``."""
        count = len(turns.tokens)
        packed = np.vstack([turns.tokens, turns.last_rows, turns.ends, turns.revived])
        packed = async_tensor_h2d(packed, device=self.device)
        for ours, theirs in zip((self.turn_tokens, self.turn_row, self.turn_end), packed):
            ours[:count] = theirs
        self.turn_limit[:, :count] = packed[3:]

    def set_quota(self, quota: int) -> None:
        if quota != self._quota:
            self._quota = quota
            self.quota.fill_(quota)

    def attach_kv_cache(
        self,
        num_slots: int,
        num_groups: int,
        state: PromptState | None,
        aux: AuxCache | None,
        parked: ParkedStates | None,
    ) -> None:
        """Make what belongs to a KV cache; called whenever vLLM makes one.

        Args:
            num_slots: physical slots of a stage.
            state: None: no prompt is pruned.
        """
        batch = len(self.index)
        stages = len(self.rows)
        ints = {"dtype": torch.int32, "device": self.device}
        self.aux = aux
        self.parked = parked
        self.selection = Selection(
            state=state or PromptState.none(batch, self.device),
            counts=self.counts,
            index=self.index,
            num_prompt=self.num_prompt,
            is_pruned=torch.zeros(batch, **ints),
            state_room=self.state_room,
            choice=Choice.of(self.choice),
            revivable=torch.zeros(batch, **ints),
            active=torch.zeros(stages, batch, **ints),
            limit=torch.zeros(stages, batch, **ints),
            quota=self.quota,
            first_row=self.first_row,
            least_revived=self.least_revived,
            turn_tokens=self.turn_tokens,
            turn_limit=self.turn_limit,
            turn_row=self.turn_row,
            turn_end=self.turn_end,
            search=self.search,
        )
        self.slot_position = torch.zeros(num_slots, **ints)
        self.slot_mappings = torch.full(
            (num_groups, self.max_rows), -1, dtype=torch.int64, device=self.device
        )
        self.piece_rows = PieceRows(num_groups, self.max_rows, self.device)
