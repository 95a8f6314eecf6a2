"""Plot and tables of docs/quality.md, from the results file alone."""

import statistics
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from benchmarks.quality.evaluate import AGREEMENT
from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import FILE, Row
from benchmarks.quality.schedules import COMPARED, SWEEP
from benchmarks.quality.shares import Full, mean_of, same_samples
from benchmarks.results import figure, read, replace_section, table
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.presets import PRESETS

_MODEL_LAYERS = 30  # SmolLM2-135M's

# Columns: tasks that begin alike are shown together.
_KINDS = ("needle", "multi-document", "few-shot", "code completion")
_AGREEMENT = {"top 1": "next token equal", "KL": "KL, nats", "continuation": "continuation equal"}


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plot beside the results file and rewrite the page's section on quality."""
    rows = read(file, Row)
    if not rows:
        return
    full = Full(rows)
    draw_sweep(rows, full, file.with_name("sweep.svg"))
    replace_section(page, "quality", section(rows, full))


def section(rows: list[Row], full: Full) -> str:
    """Markdown."""
    place = rows[0].environment
    commits = ", ".join(sorted({r.environment["commit"] for r in rows}))
    parts = {row.part: [r for r in rows if r.part == row.part] for row in rows}
    swept, at = parts["sweep"], [r for r in parts["sweep"] if r.schedule == COMPARED.name]
    defaults = [replace(r, method="the defaults") for r in at if r.method == LAZYLLM.name]
    methods, options = _comparable(at), _comparable(defaults + parts["options"])
    lengths = " and ".join(f"{n:,}" for n in sorted({r.tokens for r in swept if r.tokens}))
    sections = [
        f"SmolLM2-135M-Instruct, bf16, on one {place['gpu']}; {place['date']}, commits {commits}. "
        f"Eight tasks of {lengths} tokens, their seeds split into a half for choosing defaults and "
        "one for reporting them. The share of the full model's score is that of the means over all "
        "tasks, ± its standard error over samples that both answer; the bound is how many times "
        "fewer operations a prefill takes. Requests run in batches, and each may revive what it "
        "could alone.",
        "![Quality against speed](../benchmarks/quality/results/sweep.svg)",
        "The presets, by the samples they were chosen by and by the others "
        f"({_samples(parts['full'])}):",
        _presets(swept, full),
        f"Ways to drop tokens, all keeping {COMPARED.name} (layers), on the samples for reporting "
        f"({_samples(methods)}); tasks as shares of the full model's score, then agreement with "
        "its next tokens on real text:",
        _by_method(methods, full, "reporting"),
        "One default changed at a time, at the same schedule, on the samples for choosing "
        f"({_samples(options)}):",
        _by_method(options, full, "choosing"),
        "What revival buys, on the samples for reporting, each request with all of the budget "
        f"({_samples(parts['revival'])}):",
        _by_method(parts["revival"], full, "reporting"),
        "What the full model can do, by prompt length, on the samples for reporting "
        f"({_samples(parts['abilities'])}):",
        _abilities([r for r in parts["abilities"] if r.half == "reporting"]),
    ]
    return "\n\n".join(sections)


def _comparable(rows: list[Row]) -> list[Row]:
    tasks = same_samples([row for row in rows if row.task != COMPUTED])
    return tasks + [row for row in rows if row.task == COMPUTED]


def _samples(rows: list[Row]) -> str:
    (count,) = {row.samples for row in rows if row.task != COMPUTED}
    return f"{count} of each task at each length"


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of tasks by method and schedule."""
    rows_of = defaultdict(list)
    for row in rows:
        if row.task != COMPUTED:
            rows_of[row.method, row.schedule].append(row)
    return rows_of


def _percent(share: tuple[float, float]) -> str:
    return f"{share[0]:.1%} ± {share[1]:.1%}"


def _plain(mean: tuple[float, float]) -> str:
    return f"{mean[0]:.3f} ± {mean[1]:.3f}"


def preset_rows(swept: list[Row], preset: str) -> list[Row]:
    """Of the sweep, those of a preset's schedule."""
    prune = [b.model_dump() for b in LazyLLMConfig(preset=preset).boundaries(_MODEL_LAYERS)]
    name = next(s.name for s in SWEEP if s.prune(_MODEL_LAYERS) == prune)
    return groups(swept)[LAZYLLM.name, name]


def _presets(swept: list[Row], full: Full) -> str:
    lines = []
    for preset in PRESETS:
        mine = preset_rows(swept, preset)
        bound = statistics.fmean(row.flop_bound for row in mine)
        shares = [_percent(full.share(mine, half)) for half in ("choosing", "reporting")]
        kinds = [f"{full.share(mine, 'reporting', kind)[0]:.0%}" for kind in _KINDS]
        lines.append((f"`{preset}`", mine[0].schedule, f"{bound:.2f}x", *shares, *kinds))
    return table(("", "keeps", "bound", "chosen by", "reported", *_KINDS), lines)


def _by_method(rows: list[Row], full: Full, half: str) -> str:
    computed = {r.method: f"{r.mean:.1%}" for r in rows if r.task == COMPUTED}
    lines = []
    for (method, _), mine in groups(rows).items():
        kinds = [f"{full.share(mine, half, kind)[0]:.0%}" for kind in _KINDS]
        agree = [_plain(mean_of(mine, half, f"{AGREEMENT}: {name}")) for name in _AGREEMENT]
        line = (method, _percent(full.share(mine, half)), *kinds, *agree)
        lines.append((*line, computed.get(method, "")) if computed else line)
    head = ("", "of the full model", *_KINDS, *_AGREEMENT.values())
    return table((*head, "prompt computed") if computed else head, lines)


def _abilities(rows: list[Row]) -> str:
    lengths = sorted({row.tokens for row in rows})
    score = {(row.task, row.tokens): row for row in rows}
    lines = [
        (task, *(f"{score[task, n].mean:.2f} ± {score[task, n].error:.2f}" for n in lengths))
        for task in dict.fromkeys(row.task for row in rows if row.task != COMPUTED)
    ]
    return table(("", *(f"{n:,}" for n in lengths)), lines)


def draw_sweep(rows: list[Row], full: Full, path: Path) -> None:
    """Share of the full model's score against the FLOP-bound speed-up: a curve a method, and of
    LazyLLM's schedules one through those that no faster one outdoes."""
    reported = [r for r in rows if r.part == "sweep" and r.half == "reporting"]
    curves = defaultdict(list)
    for (method, _), mine in groups(reported).items():
        speed = statistics.fmean(row.flop_bound for row in mine)
        curves[method].append((speed, *full.share(mine, "reporting")))
    plot, axes = figure("Answers kept, against how much less a prefill computes")
    axes.axhline(1, color="#888888", label=FULL.name)
    for index, (method, points) in enumerate(curves.items()):
        style = {"color": f"C{index}", "linewidth": 0.8}
        if method == LAZYLLM.name:
            axes.plot(*zip(*[p[:2] for p in points]), ".", color=style["color"], alpha=0.4)
            points = [p for p in points if not any(q[0] > p[0] and q[1] > p[1] for q in points)]
            style["linewidth"] = 2.2
        speeds, shares, errors = zip(*sorted(points))
        axes.errorbar(speeds, shares, errors, marker="o", markersize=4, label=method, **style)
    axes.set(
        xlabel="times fewer operations", ylabel="share of the full model's score", ylim=(0, 1.1)
    )
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.18), frameon=False)
    plot.savefig(path, metadata={"Date": None})
