"""The boundary between two stages: score, rank, park, select, fetch."""

import torch

from lazyllm_vllm.kernels.begin_step import begin_step
from lazyllm_vllm.kernels.mass import keep_by_mass
from lazyllm_vllm.kernels.paged import FP8, StageKeys
from lazyllm_vllm.kernels.park_fetch import fetch, park
from lazyllm_vllm.kernels.parked import fetch_tokens, park_tokens
from lazyllm_vllm.kernels.place import place_rows
from lazyllm_vllm.kernels.queries import Queries
from lazyllm_vllm.kernels.rank import RankRule, rank_tokens
from lazyllm_vllm.kernels.select_decode import select_decode
from lazyllm_vllm.kernels.select_prefill import PrefillRows, select_prefill
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.score_reduction import ScoreReduction
from lazyllm_vllm.runtime.scorers import SCORERS
from lazyllm_vllm.runtime.state_parts import StateParts
from lazyllm_vllm.runtime.step import Step


class Boundary:
    """All boundaries of a model. In a step, in this order: ``begin``; ``score`` in the layers that
    score; at each boundary ``leave``, ``recount`` and ``enter``; parts of a step enter before it.

    Attributes:
        parks_all: whether prompts to come may share this one's hidden states at the first boundary.
        parts: the ranks' parts of hidden states, of which each parks its own.
        stage_tables: of each stage, ``(group, block table)`` of its KV cache groups.
        trace: ``observe.trace.Trace``, called at every boundary, in debugging; else None.
        later_groups: ``[groups]`` int64, of all stages but the first.
        reduction: of the ranks' scores; None: there is one rank, or nothing is pruned.
    """

    def __init__(
        self,
        schedule: Schedule,
        buffers: StepBuffers,
        stage_tables: list[list[tuple[int, torch.Tensor]]],
        block_size: int,
        parks_all: bool,
        parts: StateParts,
        trace=None,
    ) -> None:
        config = schedule.config
        self.schedule = schedule
        self.buffers = buffers
        self.stage_tables = stage_tables
        self.block_size = block_size
        self.parks_all = parks_all
        self.parts = parts
        self.trace = trace
        self.reduction: ScoreReduction | None = None
        self.scorer = SCORERS[config.score](config.score_carry)
        later = [group for tables in stage_tables[1:] for group, _ in tables]
        self.later_groups = torch.tensor(later, dtype=torch.int64, device=buffers.device)
        self.rule = RankRule(*config.score_pool, config.first_tokens, config.last_tokens)
        self.strict = schedule.is_strict and schedule.prunes
        self._keys: dict[str, StageKeys] = {}

    @property
    def _marks(self) -> bool:
        """Whether a step's selection is written down."""
        return self.strict or self.trace is not None

    def begin(self, step: Step) -> None:
        """Start a step: its rows in stage 0, and what each boundary will do."""
        if step.is_plain and not step.num_decodes:
            return
        begin_step(
            self.buffers.selection,
            self.buffers.all_rows,
            step.batch.positions,
            step.segments[0],
            step.num_decodes,
            (step.num_turns, step.turn_quota),
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
        return scores and self._ends(stage) and bool(step.prefills) and step.prefills_score(stage)

    def scoring_decodes(
        self, step: Step, stage: int, is_last_layer: bool, scores_behind: bool
    ) -> range:
        """For which decodes a layer of the stage scores: for all the last one, or behind the last
        boundary those of ``Schedule.scoring_behind``; for the last tokens of turns all that score
        prompts."""
        ends = self._ends(stage)
        if not step.decodes_select:
            return range(0)
        every_layer = self.scorer.every_layer
        first = 0 if stage or not every_layer else step.num_turns
        if is_last_layer if ends else scores_behind and self.scorer.carry > 0:
            return range(first, step.num_decodes)
        return range(first, step.num_turns) if ends and every_layer else range(0)

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
        decodes: range,
        is_first_layer: bool,
    ) -> None:
        """Score tokens by a layer's attention, whose log-denominators are in ``buffers.lse``.

        Args:
            decodes: of ``scoring_decodes``.
        """
        b, s = self.buffers, self.buffers.selection
        row = step.query_row(keys.stage)
        if prefills:
            queries = Queries(q, row, b.lse, scale, step.window_part[keys.stage])
            self.scorer.score_prefills(s, queries, keys, step.prefills, is_first_layer)
        if decodes:
            queries = Queries(q, row, b.lse[:1], scale, b.decode_window)
            turns = range(decodes.start, min(step.num_turns, decodes.stop))
            if turns:  # after the tokens before
                self.scorer.score_turns(s, queries, keys, turns)
            if others := decodes[len(turns) :]:
                self.scorer.score_decodes(s, queries, keys, others)

    def leave(
        self, step: Step, stage: int, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rank tokens and park the rows of the stage before ``stage``.

        Args:
            hidden, residual: ``[rows of stage - 1, hidden]``, what the layers hand on; residual
                None: it is in ``hidden``.

        Returns:
            The same; in one, where rows do not all go on as they are.
        """
        s, b = self.buffers.selection, self.buffers
        decodes_select = bool(step.num_decodes) and step.decodes_select
        prefills_select = bool(step.num_prefills) and step.prefills_select
        if self.reduction is not None and (decodes_select or prefills_select):
            first = 0 if decodes_select else step.first_prefill
            end = step.num_requests if prefills_select else step.num_decodes
            self.reduction.run(s, stage, range(first, end), step.batch.pruned_tokens)
        if decodes_select:
            rank_tokens(s, stage, step.decodes, step.lists, self.strict, self.rule)
        if prefills_select:
            rank_tokens(s, stage, step.prefills, 1, False, self.rule, prefill=True)
        if residual is not None and not step.drops_nothing:
            hidden, residual = hidden + residual, None
        if stage > 1:
            self._park(step, stage - 1, range(step.num_decodes, len(hidden)), hidden)
        elif b.parked is not None and (self.parks_all or not step.drops_nothing):
            mine = self.parts.mine(hidden), self.parts.mine(residual)
            park_tokens(*mine, step.batch.slot_mappings, b.parked)
        return hidden, residual

    def recount(self, step: Step, stage: int) -> None:
        """With ``keep_mass``, find how many tokens prompts keep in ``stage``, and let the step go
        by that. Waits for the device, since what is started depends on it."""
        config = self.schedule.config
        if config.keep_mass is None or not (step.num_prefills and step.prefills_select):
            return
        longest = int(step.batch.prefills.num_prompt.max())
        kept = keep_by_mass(
            self.buffers.selection,
            stage,
            step.prefills,
            longest,
            config.keep_mass,
            self.schedule.least_kept,
        )
        step.replan(stage, kept.tolist())

    def enter(
        self,
        step: Step,
        stage: int,
        hidden: torch.Tensor,
        residual: torch.Tensor | None,
        main: Step | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The hidden states of a step's rows of ``stage``.

        Args:
            hidden, residual: what ``leave`` gave.
            main: the step of which ``step`` is a part, before which others may have entered; None:
                it is no part.

        Returns:
            As ``leave``.
        """
        if step.is_plain:
            if stage == 1:
                self._note_positions(step)
            return hidden, residual
        self._select(step, stage, main or step)
        self.place(step, stage)
        if step.drops_nothing and not step.is_part:
            return hidden, residual
        rows, b = step.rows[stage], self.buffers
        out = hidden.new_empty(step.num_rows(stage), self.parts.width)
        mine = self.parts.mine(hidden)
        if stage == 1:
            fetch_tokens(out, mine, rows, b.parked)
        else:
            fetch(out, mine, rows, b.aux)
        return self.parts.whole(out), None

    def leave_part(self, part: Step, stage: int, hidden: torch.Tensor) -> None:
        """Park the rows of a part of a step that has run through ``stage``."""
        self._park(part, stage, range(len(hidden)), hidden)

    def _select(self, step: Step, stage: int, main: Step) -> None:
        """Which prompt tokens the stage has in prefills, and which it revives for decodes."""
        s, rows = self.buffers.selection, step.rows[stage]
        if step.num_prefills:
            before = main.segments[stage - 1]
            after = PrefillRows(rows, step.segments[stage])
            searches = step.prefills_select and stage not in main.searched
            main.searched.add(stage)
            select_prefill(s, stage, step.prefills, before, after, searches)
        if step.num_decodes and step.decodes_select:
            counts = step.num_decodes, step.num_turns
            select_decode(s, stage, *counts, rows, step.lists, self._marks)

    def place(self, step: Step, stage: int) -> None:
        """Where the stage's layers write the rows' keys and values."""
        b = self.buffers
        if not step.num_rows(stage):
            return
        for group, block_table in self.stage_tables[stage]:
            place_rows(
                b.slot_mappings[group],
                b.slot_position,
                step.rows[stage],
                block_table,
                step.num_rows(stage),
                self.block_size,
            )
        if self.trace and step.kind.has_requests:
            self.trace.boundary(step, stage, self.buffers)

    def _note_positions(self, step: Step) -> None:
        """The same where rows have their places, in all later stages at once."""
        rows, batch = step.num_rows(1), step.batch
        slots = batch.slot_mappings[self.later_groups, :rows]
        positions = batch.positions[:rows].to(torch.int32)
        self.buffers.slot_position[slots] = positions.expand(slots.shape)

    def _park(self, step: Step, stage: int, which: range, hidden: torch.Tensor) -> None:
        """Write rows of a stage but the first to the Aux Cache. One that goes on is written again
        at the next boundary; one that does not waits there to be revived."""
        b = self.buffers
        if b.aux is not None and len(which) and not step.drops_nothing:
            mine = self.parts.mine(hidden)
            park(mine, step.rows[stage], which, b.selection.is_pruned, b.aux)
