"""Plot and README section of the quality results, from the results file alone."""

import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.quality.evaluate import AGREEMENT
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import FILE, Row
from benchmarks.results import figure, read, replace_section, table


def main(readme: Path, file: Path = FILE) -> None:
    """Draw the plot beside the results file and rewrite the README's section on quality."""
    rows = read(file, Row)
    parts = []
    if any(row.part == "sweep" for row in rows):
        draw_sweep(rows, file.with_name("sweep.svg"))
        parts.append("![Quality against speed](benchmarks/quality/results/sweep.svg)")
    for part, title in _TITLES.items():
        mine = [row for row in rows if row.part == part]
        if mine:
            parts += [title, _table(mine, rows)]
    if parts:
        place = rows[-1].environment
        parts.insert(0, f"{place['date']}, commit {place['commit']}, on {place['gpu']}.")
        replace_section(readme, "quality", "\n\n".join(parts))


_TITLES = {
    "abilities": "What the full model can do, by prompt length.",
    "methods": "Ways to drop tokens, at one schedule; shares of the full model's score.",
    "revival": "What revival buys.",
    "presets": "The presets, on seeds that they were not chosen by.",
}


def share_of_full(mine: list[Row], rows: list[Row]) -> tuple[float, float]:
    """The average score over tasks as a share of the full model's, and its standard error; tasks
    that the full model itself gets right in less than a fifth of the cases are left out."""
    full = {
        (r.task, r.tokens, r.half): r
        for r in rows
        if r.part == "full" and r.method == FULL.name and AGREEMENT not in r.task and r.mean >= 0.2
    }
    pairs = [(r, full[k]) for r in mine if (k := (r.task, r.tokens, r.half)) in full]
    if not pairs:
        return float("nan"), float("nan")
    best = statistics.fmean(f.mean for _, f in pairs)
    share = statistics.fmean(r.mean for r, _ in pairs) / best
    # The samples are the same, so what the two get wrong is shared: this errs on the large side.
    error = sum(r.error**2 + f.error**2 for r, f in pairs) ** 0.5 / len(pairs) / best
    return share, error


def _groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    found = defaultdict(list)
    for row in rows:
        found[row.method, row.schedule].append(row)
    return found


def _table(mine: list[Row], rows: list[Row]) -> str:
    cells = list(dict.fromkeys((row.task, row.tokens) for row in mine))
    groups = _groups(mine)
    head = ["task", "prompt", *(method for method, _ in groups)]
    lines = []
    for task, tokens in cells:
        line = [task, f"{tokens:,}"]
        for group in groups.values():
            row = next((r for r in group if (r.task, r.tokens) == (task, tokens)), None)
            line.append(f"{row.mean:.2f} ± {row.error:.2f}" if row else "")
        lines.append(tuple(line))
    shares = [share_of_full(group, rows) for group in groups.values()]
    if not all(share != share for share, _ in shares):
        lines.append(("share of full model", "", *(f"{s:.1%} ± {e:.1%}" for s, e in shares)))
    return table(tuple(head), lines)


def draw_sweep(rows: list[Row], path: Path) -> None:
    """Share of the full model's average against the FLOP-bound speed-up, a curve a method."""
    mine = [row for row in rows if row.part == "sweep"]
    curves = defaultdict(list)
    for (method, _), group in _groups(mine).items():
        speed = statistics.fmean(row.flop_bound for row in group)
        curves[method].append((speed, *share_of_full(group, rows)))
    drawn, axes = figure("Answers kept, against how much less a prefill computes")
    axes.axhline(1, color="#888888", label="full model")
    for method, points in curves.items():
        points = _upper(points)
        speeds, shares, errors = zip(*points)
        style = {"linewidth": 2.2} if method == LAZYLLM.name else {"linewidth": 1.2}
        axes.errorbar(speeds, shares, errors, marker="o", markersize=4, label=method, **style)
    axes.set(xlabel="times fewer operations", ylabel="share of the full model's score")
    axes.legend(fontsize=8)
    drawn.savefig(path, metadata={"Date": None})


def _upper(points: list[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    """Those that no other beats in both speed and score, from the slowest."""
    kept: list[tuple[float, float, float]] = []
    for point in sorted(points, reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]
