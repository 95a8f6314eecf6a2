"""The boundary between two stages: score, rank, select, park, fetch."""

import torch

from lazyllm_vllm.kernels.begin_step import begin_step
from lazyllm_vllm.kernels.paged import FP8, StageKeys
from lazyllm_vllm.kernels.park_fetch import fetch, park
from lazyllm_vllm.kernels.place import place_rows
from lazyllm_vllm.kernels.rank import RankRule, rank_tokens
from lazyllm_vllm.kernels.score import Queries
from lazyllm_vllm.kernels.select_decode import select_decode
from lazyllm_vllm.kernels.select_prefill import PrefillRows, select_prefill
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.scorers import SCORERS
from lazyllm_vllm.runtime.step import Step


class Boundary:
    """All boundaries of a model. In a step, in this order: ``begin``; ``score`` in the layers that
    score; ``cross`` into each stage.

    Attributes:
        stage_tables: of each stage, ``(group, block table)`` of its KV cache groups.
        trace: ``observe.trace.Trace``, called at every boundary, in debugging; else None.
    """

    def __init__(
        self,
        schedule: Schedule,
        buffers: StepBuffers,
        stage_tables: list[list[tuple[int, torch.Tensor]]],
        block_size: int,
        trace=None,
    ) -> None:
        config = schedule.config
        self.schedule = schedule
        self.buffers = buffers
        self.stage_tables = stage_tables
        self.block_size = block_size
        self.trace = trace
        self.scorer = SCORERS[config.score]()
        self.rule = RankRule(config.score_pool, config.first_tokens, config.last_tokens)
        self.strict = schedule.is_strict and schedule.prunes
        self._keys: dict[str, StageKeys] = {}

    @property
    def _marks(self) -> bool:
        """Whether a step's selection is written down."""
        return self.strict or self.trace is not None

    def begin(self, step: Step) -> None:
        """Start a step: its rows in stage 0, and what each boundary will do."""
        begin_step(
            self.buffers.selection,
            self.buffers.all_rows,
            step.batch.positions,
            step.segments[0],
            step.num_decodes,
            step.revive_rows,
            step.decodes_select and self._marks,
        )
        if self.trace and step.kind.has_requests:
            self.trace.begin(step)

    def keys_of(
        self,
        layer: str,
        kv_cache: torch.Tensor,
        stage: int,
        group: int,
        scales: tuple[float, float] = (1.0, 1.0),
    ) -> StageKeys:
        """The keys of a layer, by its name; the same in every step.

        Args:
            scales: of an FP8 cache's keys and values.
        """
        if layer not in self._keys:
            table = next(table for at, table in self.stage_tables[stage] if at == group)
            b = self.buffers
            if kv_cache.dtype == torch.uint8:  # as vLLM hands on an FP8 cache
                kv_cache = kv_cache.view(FP8)
            keys = StageKeys(
                kv_cache, table, b.rows[stage].num_keys, b.slot_position, stage, *scales
            )
            self._keys[layer] = keys
        return self._keys[layer]

    def scores_prefills(self, step: Step, stage: int, is_last_layer: bool) -> bool:
        """Whether a layer of the stage scores the prompts being prefilled."""
        scores = is_last_layer or self.scorer.every_layer
        return scores and step.prefills_select and bool(step.prefills) and self._ends(stage)

    def scores_decodes(self, step: Step, stage: int, is_last_layer: bool) -> bool:
        """Whether a layer of the stage scores for the decodes."""
        return is_last_layer and step.decodes_select and bool(step.decodes) and self._ends(stage)

    def _ends(self, stage: int) -> bool:
        """Whether the stage ends at a boundary."""
        return stage < self.schedule.num_stages - 1

    def score(
        self,
        step: Step,
        q: torch.Tensor,
        keys: StageKeys,
        scale: float,
        *,
        prefills: bool,
        decodes: bool,
        is_first_layer: bool,
    ) -> None:
        """Score tokens by a layer's attention, whose log-denominators are in ``buffers.lse``."""
        b, s = self.buffers, self.buffers.selection
        row = step.query_row(keys.stage)
        if prefills:
            queries = Queries(q, row, b.lse, scale)
            self.scorer.score_prefills(s, queries, keys, step.prefills, is_first_layer)
        if decodes:
            queries = Queries(q, row, b.lse[:1], scale)
            self.scorer.score_decodes(s, queries, keys, step.decodes, s.active[keys.stage + 1])

    def cross(
        self, step: Step, stage: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Carry hidden states over the boundary into ``stage``.

        Args:
            hidden, residual: ``[rows of stage - 1, hidden]``, what the layers hand on; residual
                None: it is in ``hidden``.

        Returns:
            The same for the rows of ``stage``.
        """
        self._rank(step, stage)
        self._select(step, stage)
        self._place(step, stage)
        if self.trace and step.kind.has_requests:
            self.trace.boundary(step, stage, self.buffers)
        if step.drops_nothing:
            return hidden, residual
        hidden = hidden if residual is None else hidden + residual
        self._park(step, stage, hidden)
        return self._fetch(step, stage, hidden), None

    def _rank(self, step: Step, stage: int) -> None:
        """Scores to ranks, for those that choose anew."""
        s = self.buffers.selection
        if step.num_decodes and step.decodes_select:
            rank_tokens(s, stage, step.decodes, step.lists, self.strict, self.rule)
        if step.num_prefills and step.prefills_select:
            rank_tokens(s, stage, step.prefills, 1, False, self.rule)

    def _select(self, step: Step, stage: int) -> None:
        """Which prompt tokens the stage has in prefills, and which it revives for decodes."""
        s, rows = self.buffers.selection, self.buffers.rows
        if step.num_prefills:
            before, after = (PrefillRows(rows[at], step.segments[at]) for at in (stage - 1, stage))
            select_prefill(s, stage, step.num_decodes, before, after, step.prefills_select)
        if step.num_decodes and step.decodes_select:
            select_decode(s, stage, step.num_decodes, rows[stage], step.lists, self._marks)

    def _place(self, step: Step, stage: int) -> None:
        """Where the stage's layers write the rows' keys and values."""
        b = self.buffers
        for group, block_table in self.stage_tables[stage]:
            place_rows(
                b.slot_mappings[group],
                b.slot_position,
                b.rows[stage],
                block_table,
                step.num_rows(stage),
                self.block_size,
            )

    def _park(self, step: Step, stage: int, hidden: torch.Tensor) -> None:
        """Write the hidden states of all rows but the decodes' own to the Aux Cache. One that goes
        on is written again at the next boundary; one that does not waits there to be revived."""
        b = self.buffers
        which = range(step.num_decodes, step.num_rows(stage - 1))
        if b.aux is not None and len(which):
            park(hidden, b.rows[stage - 1], which, b.selection.is_pruned, b.aux)

    def _fetch(self, step: Step, stage: int, hidden: torch.Tensor) -> torch.Tensor:
        """The stage's rows: from the rows before, or revived from the Aux Cache."""
        out = hidden.new_empty(step.num_rows(stage), hidden.shape[1])
        fetch(out, hidden, self.buffers.rows[stage], self.buffers.aux)
        return out
