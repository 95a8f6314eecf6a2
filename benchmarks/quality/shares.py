"""Scores as shares of the full model's, with standard errors over samples that both answered."""

import math
import statistics
from collections import defaultdict
from dataclasses import replace

from benchmarks.quality.evaluate import AGREEMENT, mean_and_error
from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import FULL
from benchmarks.quality.results import Row

LEAST = 0.5  # a task that the full model scores less in, at a length, tells little


class Full:
    """The full model's rows.

    A cell is a task at a length. One counts in both halves of the seeds or in neither, by the full
    model's mean over both.

    Args:
        least: what the full model must score in a cell that counts.
        part: where its rows are.
    """

    def __init__(self, rows: list[Row], least: float = LEAST, part: str = "full") -> None:
        scores = defaultdict(list)
        mine = [r for r in rows if r.part == part and r.method == FULL.name and is_task(r)]
        for row in mine:
            scores[row.model, row.task, row.tokens].append(row.mean)
        self._rows = {
            (r.model, r.task, r.tokens, r.half): r
            for r in mine
            if statistics.fmean(scores[r.model, r.task, r.tokens]) >= least
        }

    def counts(self, row: Row) -> bool:
        """Whether a row's cell does, and has a standard error."""
        return self._of(row) is not None

    def share(
        self, mine: list[Row], half: str, task: str | None = None, tokens: int | None = None
    ) -> tuple[float, float]:
        """The mean score over the cells that count, of one task or length alone if it is given,
        over the full model's, and its standard error: that of the samples' differences, since both
        answer the same ones. NaN if there is no such cell.

        Args:
            mine: rows of one model.
        """
        pairs = [
            pair
            for row in mine
            if row.half == half
            and task in (None, row.task)
            and tokens in (None, row.tokens)
            and (pair := self._of(row))
        ]
        best = statistics.fmean(statistics.fmean(full) for _, full in pairs) if pairs else 0
        if not best:
            return math.nan, math.nan
        share = statistics.fmean(statistics.fmean(values) for values, _ in pairs) / best
        variance = sum(
            statistics.variance([a - share * b for a, b in zip(values, full)]) / len(values)
            for values, full in pairs
        )
        return share, math.sqrt(variance) / len(pairs) / best

    def by_task(self, mine: list[Row], half: str) -> dict[str, tuple[float, float]]:
        """Shares over all lengths of each task that has a cell that counts."""
        tasks = dict.fromkeys(r.task for r in mine if r.half == half and self.counts(r))
        shares = {task: self.share(mine, half, task) for task in tasks}
        return {task: share for task, share in shares.items() if not math.isnan(share[0])}

    def _of(self, row: Row) -> tuple[list[float], list[float]] | None:
        """The row's values and the full model's of the same samples, two or more."""
        full = self._rows.get((row.model, row.task, row.tokens, row.half))
        if not full:
            return None
        both = list(zip(row.values, full.values))  # of the seeds that both have, the first
        return tuple(map(list, zip(*both))) if len(both) > 1 else None


def is_task(row: Row) -> bool:
    """Whether a row is of a task with answers."""
    return row.task != COMPUTED and AGREEMENT not in row.task


def told_half(rows: list[Row]) -> str:
    """Of the samples, the half for reporting, or if there are no rows of it that for choosing."""
    return "reporting" if any(r.half == "reporting" for r in rows) else "choosing"


def same_samples(rows: list[Row]) -> list[Row]:
    """Rows to compare with each other: in each cell as many samples, the first, as that with the
    fewest there."""

    def cell(row: Row) -> tuple:
        return row.model, row.task, row.tokens, row.half

    fewest: dict[tuple, int] = {}
    for row in rows:
        fewest[cell(row)] = min(row.samples, fewest.get(cell(row), row.samples))

    def cut(row: Row) -> Row:
        values = row.values[: fewest[cell(row)]]
        mean, error = mean_and_error(values)
        return replace(row, values=values, samples=len(values), mean=mean, error=error)

    return [cut(row) for row in rows]


def mean_of(rows: list[Row], half: str, task: str) -> tuple[float, float]:
    """A task's mean over lengths, and its standard error; NaN if there is none."""
    of_task = [r for r in rows if r.half == half and r.task == task]
    if not of_task:
        return math.nan, math.nan
    error = math.sqrt(sum(r.error**2 for r in of_task)) / len(of_task)
    return statistics.fmean(r.mean for r in of_task), error
