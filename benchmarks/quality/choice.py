"""Which schedules may be presets: the fastest whose worst task keeps enough, on all models and on
both halves of the samples."""

import math
from collections import defaultdict
from dataclasses import dataclass

from benchmarks.quality.methods import LAZYLLM
from benchmarks.quality.results import Row
from benchmarks.quality.shares import Full
from benchmarks.quality.worst import runs

FLOORS = (0.99, 0.97, 0.9)  # of the worst task
HALVES = ("choosing", "reporting")


@dataclass(frozen=True)
class Place:
    """A task's share of the full model's score, its lengths together."""

    model: str
    half: str
    task: str
    share: float
    error: float


@dataclass(frozen=True)
class Candidate:
    """A schedule that was measured everywhere.

    Attributes:
        bound: how many times fewer operations: of the models, the lowest.
        places: of every task that counts, on every model, in both halves.
    """

    schedule: str
    bound: float
    places: tuple[Place, ...]

    @property
    def worst(self) -> Place:
        return min(self.places, key=lambda place: place.share)

    def holds(self, floor: float, errors: float = 0) -> bool:
        """Whether no task falls under the floor, or by no more than so many standard errors."""
        return all(place.share + errors * place.error >= floor for place in self.places)


def candidates(
    rows: list[Row], full: Full, method: str = LAZYLLM.name
) -> tuple[list[Candidate], int]:
    """Of a method's schedules in the sweep, and how many others lack a cell that counts and some
    schedule has: on fewer tasks or models, worst tasks do not compare."""
    mine = [r for r in rows if r.part == "sweep" and r.method == method]
    models = list(dict.fromkeys(r.model for r in mine))
    cells, of_schedule = defaultdict(set), defaultdict(set)
    for row in mine:
        if full.counts(row):
            cell = row.model, row.half, row.task, row.tokens
            cells[row.model, row.half].add(cell)
            of_schedule[row.schedule].add(cell)
    places = [(model, half) for model in models for half in HALVES]
    if not all(cells[place] for place in places):
        return [], len({r.schedule for r in mine})
    needed = set().union(*cells.values())
    by_schedule = defaultdict(dict)
    for model in models:
        for run in runs([r for r in mine if r.model == model]):
            by_schedule[run.schedule][model] = run
    found = [
        Candidate(
            schedule,
            min(run.bound for run in of_model.values()),
            tuple(
                Place(model, half, task, *share)
                for model, half in places
                for task, share in full.by_task(of_model[model].rows, half).items()
            ),
        )
        for schedule, of_model in by_schedule.items()
        if of_schedule[schedule] == needed
    ]
    found = [c for c in found if not math.isnan(c.bound)]
    return found, len(by_schedule) - len(found)


def choose(found: list[Candidate], floor: float, errors: float = 0) -> Candidate | None:
    """The one that takes the fewest operations of those that hold, of equals (as tables print
    them) the one more exact in its worst task; None: none holds."""
    holding = [c for c in found if c.holds(floor, errors)]
    return max(holding, key=lambda c: (round(c.bound, 2), c.worst.share), default=None)
