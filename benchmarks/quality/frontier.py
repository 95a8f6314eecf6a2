"""Plots of what is kept of the answers against how many operations are saved."""

import math
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.shares import Full, told_half
from benchmarks.quality.worst import Run, worst
from benchmarks.results import figure

Point = tuple[float, float, float]  # times fewer operations, share, its standard error


def plot_file(folder: Path, kind: str, model: str) -> Path:
    """Where the plot of a model's ``worst`` tasks or of its ``mean`` lies."""
    return folder / f"{kind}-{re.sub(r'[^a-z0-9.]+', '-', model.lower())}.svg"


def draw(
    measured: list[Run], presets: dict[str, Run], full: Full, folder: Path, model: str
) -> None:
    """Both plots of a model, from its sweep and its rivals: a dot a schedule, a curve a method
    through those that none of its own outdoes, a star a preset. On the half of the samples that
    is told of."""
    half = told_half([row for run in measured for row in run.rows])

    def of_worst(run: Run) -> tuple[float, float]:
        found = worst(full, run.rows, half)
        return (found.share, found.error) if found else (math.nan, math.nan)

    def of_mean(run: Run) -> tuple[float, float]:
        return full.share(run.rows, half)

    for kind, share, told in (
        ("worst", of_worst, "the worst task"),
        ("mean", of_mean, "the mean over tasks"),
    ):
        path = plot_file(folder, kind, model)
        stars = {name: (run.bound, share(run)[0]) for name, run in presets.items()}
        _draw(curves(measured, share), stars, f"{model}: {told}", path)


def curves(
    measured: list[Run], share: Callable[[Run], tuple[float, float]]
) -> dict[str, list[Point]]:
    """Points by method, the slowest first; those of one with a number in its name are one curve's.
    What has no share or no bound is left out."""
    points: dict[str, dict[str, Point]] = defaultdict(dict)
    for run in measured:
        point = (run.bound, *share(run))
        if not any(map(math.isnan, point[:2])):
            name = re.sub(r", [\d.]+$", "", run.method)
            points[name].setdefault(f"{run.method} {run.schedule}", point)
    return {name: sorted(of.values()) for name, of in points.items()}


def not_outdone(points: list[Point]) -> list[Point]:
    """Those that none outdoes which is as fast and keeps more, or faster and keeps as much."""

    def outdone(p: Point) -> bool:
        return any(q[:2] != p[:2] and q[0] >= p[0] and q[1] >= p[1] for q in points)

    return [p for p in points if not outdone(p)]


def _draw(
    by_method: dict[str, list[Point]], stars: dict[str, tuple[float, float]], title: str, path: Path
) -> None:
    plot, axes = figure(title)
    axes.axhline(1, color="#888888", label=FULL.name)
    for index, (method, points) in enumerate(by_method.items()):
        style = {
            "color": f"C{index % 10}",
            "linestyle": "-" if index < 10 else "--",
            "linewidth": 0.8,
        }
        if method == LAZYLLM.name:
            style["linewidth"] = 2.2
        axes.plot(*zip(*[p[:2] for p in points]), ".", color=style["color"], alpha=0.4)
        speeds, shares, errors = zip(*not_outdone(points))
        axes.errorbar(speeds, shares, errors, marker="o", markersize=4, label=method, **style)
    for preset, at in stars.items():
        if not any(map(math.isnan, at)):
            axes.plot(*at, "*", color="black", markersize=9, zorder=5)
            axes.annotate(preset, at, (0, -13), textcoords="offset points", fontsize=7, ha="center")
    axes.set(
        xlabel="times fewer operations", ylabel="share of the full model's score", ylim=(0, 1.2)
    )
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    plot.savefig(path, metadata={"Date": None})
