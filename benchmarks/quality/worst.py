"""The worst task of a method at a schedule: a mean over tasks hides the one that it loses."""

import math
import statistics
from dataclasses import dataclass, field

from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import LAZYLLM
from benchmarks.quality.results import Row
from benchmarks.quality.schedules import Schedule
from benchmarks.quality.shares import Full
from lazyllm_vllm.plan.presets import PRESETS

FLOOR = 0.97  # what no task should fall under at the default


@dataclass
class Run:
    """A method at a schedule, on one model.

    Attributes:
        rows: of tasks and of agreement.
        computed: what share of the prompts it computed, if it tells.
    """

    method: str
    schedule: str
    rows: list[Row] = field(default_factory=list)
    computed: list[Row] = field(default_factory=list)

    @property
    def share_computed(self) -> float:
        """Of the (prompt token, layer) pairs, those revived among them; NaN if it does not tell."""
        return statistics.fmean(r.mean for r in self.computed) if self.computed else math.nan

    @property
    def bound(self) -> float:
        """How many times fewer operations a prefill takes, over lengths. Where that depends on the
        prompt, ``is_estimate``: by the pairs computed; attention, of which more is saved than
        of these, is not counted. NaN if neither is told."""
        if self.is_estimate:
            return 1 / self.share_computed
        return statistics.fmean({r.tokens: r.flop_bound for r in self.rows}.values())

    @property
    def is_estimate(self) -> bool:
        return any(row.flop_bound is None for row in self.rows)


@dataclass(frozen=True)
class Worst:
    """Attributes:
    task: with the lowest share of the full model's score, its lengths together.
    counted: how many tasks had a cell that counts.
    under: those under ``FLOOR``, the worst first.
    """

    task: str
    share: float
    error: float
    counted: int
    under: tuple[str, ...]


def worst(full: Full, rows: list[Row], half: str) -> Worst | None:
    """None: no task counts. ``rows`` are of one run."""
    shares = sorted(full.by_task(rows, half).items(), key=lambda item: item[1][0])
    if not shares:
        return None
    task, (share, error) = shares[0]
    under = tuple(name for name, (kept, _) in shares if kept < FLOOR)
    return Worst(task, share, error, len(shares), under)


def runs(rows: list[Row]) -> list[Run]:
    """Of rows of one model and part, as they come."""
    found: dict[tuple[str, str], Run] = {}
    for row in rows:
        key = row.method, row.schedule
        run = found.setdefault(key, Run(*key))
        (run.computed if row.task == COMPUTED else run.rows).append(row)
    return [run for run in found.values() if run.rows]


def preset_schedule(preset: str) -> str:
    """The name of a preset's schedule, by the depths that it was chosen at: in a model its cuts may
    lie a few layers from there."""
    return Schedule(PRESETS[preset]).name


def preset_runs(parts: dict[str, list[Row]]) -> dict[str, Run]:
    """Presets that were measured on a model, by name: as they are, in a part ``presets`` with
    methods of their names, or else by their schedules in the sweep.

    Args:
        parts: the model's rows by part.
    """
    itself = {run.method: run for run in runs(parts.get("presets", []))}
    swept = runs(parts.get("sweep", []))
    of_schedule = {run.schedule: run for run in swept if run.method == LAZYLLM.name}
    found = {p: itself.get(p) or of_schedule.get(preset_schedule(p)) for p in PRESETS}
    return {preset: run for preset, run in found.items() if run}
