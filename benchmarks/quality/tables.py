"""Tables of docs/quality.md."""

import math
import statistics
from dataclasses import replace
from itertools import compress

from benchmarks.quality.choice import HALVES
from benchmarks.quality.evaluate import AGREEMENT
from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import LAZYLLM
from benchmarks.quality.results import LONGER, Row
from benchmarks.quality.shares import Full, is_task, mean_of, same_samples
from benchmarks.quality.worst import FLOOR, Run, preset_runs, worst
from benchmarks.results import table

_AGREEMENT = {"top 1": "next token equal", "KL": "KL, nats", "continuation": "continuation equal"}
NONE = "–"


def percent(share: tuple[float, float]) -> str:
    return NONE if math.isnan(share[0]) else f"{share[0]:.1%} ± {share[1]:.1%}"


def samples(rows: list[Row]) -> str:
    counts = {row.samples for row in rows if is_task(row)}
    least, most = min(counts, default=0), max(counts, default=0)
    told = f"{least}" if least == most else f"{least} to {most}"
    return f"{told} of each task at each length"


def comparable(rows: list[Row]) -> list[Row]:
    """Over as many samples in each cell, whatever the method."""
    tasks = same_samples([row for row in rows if row.task != COMPUTED])
    return tasks + [row for row in rows if row.task == COMPUTED]


def with_defaults(at: list[Row], others: list[Row] | None) -> list[Row]:
    """LazyLLM's rows of the sweep before those of others at the same schedule, if there are any."""
    return [r for r in at if r.method == LAZYLLM.name] + others if others else []


def presets(measured: dict[str, Run], full: Full) -> str:
    """One line a preset."""
    lines = []
    for preset, run in measured.items():
        line = [f"`{preset}`", run.schedule or NONE, _bound(run)]
        for half in HALVES:
            line += _worst(full, run, half)
        lines.append((*line, *(percent(full.share(run.rows, half)) for half in HALVES)))
    under = f"under {FLOOR:.0%}"
    worst_task = ("worst task", "its share", under)
    head = ("", "keeps", "bound", *(f"{name}, {half}" for half in HALVES for name in worst_task))
    return table((*head, *(f"mean, {half}" for half in HALVES)), lines)


def by_task(measured: dict[str, Run], full: Full, best: list[Row], half: str) -> str:
    """One column a preset, one line a task that counts.

    Args:
        best: the full model's rows.
    """
    shares = {p: full.by_task(run.rows, half) for p, run in measured.items()}
    counting = [r for r in best if full.counts(r)]
    lines = [
        (
            task,
            f"{mean_of(counting, half, task)[0]:.2f}",
            *(percent(of.get(task, (math.nan, math.nan))) for of in shares.values()),
        )
        for task in dict.fromkeys(task for of in shares.values() for task in of)
    ]
    return table(("", "full model", *(f"`{preset}`" for preset in shares)), lines)


def by_length(run: Run, full: Full, half: str) -> str:
    """One column a length."""
    rows = [r for r in run.rows if r.half == half and full.counts(r)]
    lengths = sorted({r.tokens for r in rows})
    lines = [
        (task, *(percent(full.share(rows, half, task, n)) for n in lengths))
        for task in dict.fromkeys(r.task for r in rows)
    ]
    return table(("", *(f"{n:,}" for n in lengths)), lines)


def longer(rows: list[Row]) -> str:
    """A line for each preset at each length: of the part that has the full model's rows, too."""
    full, lines = Full(rows, part=LONGER), []
    for tokens in sorted({r.tokens for r in rows if is_task(r)}):
        for preset, run in preset_runs({"sweep": rows}).items():
            at = replace(run, rows=[r for r in run.rows if r.tokens == tokens])
            mean = full.share(at.rows, "reporting")
            if not math.isnan(mean[0]):
                told = _worst(full, at, "reporting")
                lines.append((f"{tokens:,}", f"`{preset}`", *told, percent(mean)))
    head = ("tokens", "preset", "worst task", "its share", f"under {FLOOR:.0%}", "mean")
    return table(head, lines)


def by_method(
    measured: list[Run], full: Full, half: str, named: dict[str, str] | None = None
) -> str:
    """One line a method.

    Args:
        named: what some methods are called instead.
    """
    lines = []
    of_schedule = len({run.schedule for run in measured}) > 1
    for run in measured:
        agree = (_plain(mean_of(run.rows, half, f"{AGREEMENT}: {name}")) for name in _AGREEMENT)
        lines.append(
            (
                (named or {}).get(run.method, run.method),
                run.schedule if of_schedule else NONE,
                _bound(run),
                *_worst(full, run, half),
                percent(full.share(run.rows, half)),
                *agree,
                NONE if math.isnan(run.share_computed) else f"{run.share_computed:.1%}",
            )
        )
    head = ("", "keeps", "bound", "worst task", "its share", f"under {FLOOR:.0%}", "mean")
    return _told((*head, *_AGREEMENT.values(), "prompt computed"), lines)


def _told(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A table without the columns that tell nothing."""
    told = [any(line[i] != NONE for line in lines) for i in range(len(head))]
    shown = [tuple(compress(line, told)) for line in (head, *lines)]
    return table(shown[0], shown[1:])


def at_equal_operations(measured: list[Run]) -> list[tuple[str, list[Run]]]:
    """Runs beside those of LazyLLM that take as many operations, and the others, whose operations
    follow the prompt, by themselves; each with a title."""
    fixed = [run for run in measured if not run.is_estimate]
    likes = [run for run in fixed if run.method == LAZYLLM.name]
    if not likes:
        return [("As measured", measured)]

    def like(run: Run) -> Run:
        """The one of its own schedule, or the nearest."""
        same = (other for other in likes if other.schedule == run.schedule)
        return next(same, None) or min(likes, key=lambda other: abs(other.bound - run.bound))

    groups = [
        (
            f"At {of.bound:.2f} times fewer operations ({of.schedule})",
            [run for run in fixed if like(run) is of],
        )
        for of in likes
    ]
    if rest := [run for run in measured if run.is_estimate]:
        groups.append(("By shares of the attention's mass, so that operations follow it", rest))
    return groups


def kept(measured: list[Run]) -> str | None:
    """The spread over prompts, of runs that tell of each; None: none does."""
    lines = []
    for run in measured:
        values = [value for row in run.computed for value in row.values]
        if len(values) > 1:
            tenths = statistics.quantiles(values, n=10)
            told = (tenths[0], statistics.median(values), tenths[-1])
            lines.append((run.method, run.schedule, *(f"{value:.0%}" for value in told)))
    head = ("", "keeps", "a tenth of the prompts less than", "median", "a tenth more than")
    return table(head, lines) if lines else None


def abilities(rows: list[Row]) -> str:
    lengths = sorted({row.tokens for row in rows})
    score = {(row.task, row.tokens): (row.mean, row.error) for row in rows}
    none = (math.nan, math.nan)
    lines = [
        (task, *(_plain(score.get((task, n), none), 2) for n in lengths))
        for task in dict.fromkeys(row.task for row in rows if is_task(row))
    ]
    return table(("", *(f"{n:,}" for n in lengths)), lines)


def _bound(run: Run) -> str:
    if math.isnan(run.bound):
        return NONE
    return f"about {run.bound:.1f}x" if run.is_estimate else f"{run.bound:.2f}x"


def _worst(full: Full, run: Run, half: str) -> tuple[str, str, str]:
    found = worst(full, run.rows, half)
    if not found:
        return NONE, NONE, NONE
    under = f"{len(found.under)} of {found.counted}"
    return found.task, percent((found.share, found.error)), under


def _plain(mean: tuple[float, float], digits: int = 3) -> str:
    return NONE if math.isnan(mean[0]) else f"{mean[0]:.{digits}f} ± {mean[1]:.{digits}f}"
