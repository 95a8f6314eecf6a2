"""Scores as shares of the full model's, with standard errors over samples that both answered."""

import math
import statistics
from dataclasses import replace

from benchmarks.quality.evaluate import AGREEMENT, mean_and_error
from benchmarks.quality.methods import FULL
from benchmarks.quality.results import Row

LEAST = 0.2  # a task that the full model scores less in tells nothing


class Full:
    """The full model's rows."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows = {
            (r.task, r.tokens, r.half): r
            for r in rows
            if r.part == "full" and r.method == FULL.name and r.mean >= LEAST
        }

    def share(self, mine: list[Row], half: str, kind: str = "") -> tuple[float, float]:
        """The mean score over tasks whose names contain ``kind``, over the full model's, and its
        standard error: that of the samples' differences, since both answer the same ones (of the
        full model's, as many as ``mine`` has). NaN if there is no such task."""
        pairs = [
            (row.values, full.values[: row.samples])
            for row in mine
            if row.half == half
            and kind in row.task
            and AGREEMENT not in row.task
            and (full := self._rows.get((row.task, row.tokens, row.half)))
        ]
        if not pairs:
            return math.nan, math.nan
        best = statistics.fmean(statistics.fmean(full) for _, full in pairs)
        share = statistics.fmean(statistics.fmean(values) for values, _ in pairs) / best
        variance = sum(
            statistics.variance([a - share * b for a, b in zip(values, full)]) / len(values)
            for values, full in pairs
        )
        return share, math.sqrt(variance) / len(pairs) / best


def same_samples(rows: list[Row]) -> list[Row]:
    """Rows to compare with each other: of all as many samples, the first, as that with fewest."""
    fewest = min(row.samples for row in rows)

    def cut(row: Row) -> Row:
        mean, error = mean_and_error(row.values[:fewest])
        values = row.values[:fewest]
        return replace(row, values=values, samples=fewest, mean=mean, error=error)

    return [cut(row) for row in rows]


def mean_of(rows: list[Row], half: str, task: str) -> tuple[float, float]:
    """A task's mean over lengths, and its standard error."""
    of_task = [r for r in rows if r.half == half and r.task == task]
    error = math.sqrt(sum(r.error**2 for r in of_task)) / len(of_task)
    return statistics.fmean(r.mean for r in of_task), error
