"""Plot and README section of the quality results, from the results file alone."""

import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.quality.evaluate import AGREEMENT
from benchmarks.quality.jobs import COMPUTED
from benchmarks.quality.methods import FULL, LAZYLLM
from benchmarks.quality.results import FILE, Row
from benchmarks.quality.schedules import COMPARED, SWEEP
from benchmarks.quality.shares import Full, mean_of
from benchmarks.results import figure, read, replace_section, table
from lazyllm_vllm.config import PRESETS, preset_boundaries

_MODEL_LAYERS = 30  # SmolLM2-135M's

# Columns: tasks that begin alike are shown together.
_KINDS = ("needle", "multi-document", "few-shot", "code completion")
_AGREEMENT = {"top 1": "next token equal", "KL": "KL, nats", "continuation": "continuation equal"}


def main(readme: Path, file: Path = FILE) -> None:
    """Draw the plot beside the results file and rewrite the README's section on quality."""
    rows = read(file, Row)
    if not rows:
        return
    full = Full(rows)
    draw_sweep(rows, full, file.with_name("sweep.svg"))
    replace_section(readme, "quality", section(rows, full))


def section(rows: list[Row], full: Full) -> str:
    """Markdown."""
    place = rows[0].environment
    swept = [r for r in rows if r.part == "sweep"]
    samples = swept[0].samples
    lengths = " and ".join(f"{n:,}" for n in sorted({r.tokens for r in swept if r.tokens}))
    at = COMPARED.name
    parts = [
        f"SmolLM2-135M-Instruct, bf16, on one {place['gpu']}; {place['date']}, commit "
        f"{place['commit']}. Eight tasks of {lengths} tokens, {samples} samples of each for "
        f"choosing defaults and {samples} others for reporting them. The share of the full model's "
        "score is that of the means over all tasks, ± its standard error over samples that both "
        "answer; the bound is how many times fewer operations a prefill takes. Requests run in "
        "batches, and each may revive what it could alone.",
        "![Quality against speed](benchmarks/quality/results/sweep.svg)",
        "The presets, by the samples they were chosen by and by the others:",
        _presets(swept, full),
        f"Ways to drop tokens, all keeping {at} (layers), on the samples for reporting; tasks as "
        "shares of the full model's score, then agreement with its next tokens on real text:",
        _by_method([r for r in swept if r.schedule == at], full, "reporting"),
        "One default changed at a time, on the samples for choosing:",
        _by_method([r for r in rows if r.part == "options"], full, "choosing"),
        "What revival buys, on the samples for reporting, each request with all of the budget:",
        _by_method([r for r in rows if r.part == "revival"], full, "reporting"),
        "What the full model can do, by prompt length:",
        _abilities([r for r in rows if r.part == "abilities"]),
    ]
    return "\n\n".join(parts)


def groups(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of tasks by method and schedule."""
    found = defaultdict(list)
    for row in rows:
        if row.task != COMPUTED:
            found[row.method, row.schedule].append(row)
    return found


def _percent(share: tuple[float, float]) -> str:
    return f"{share[0]:.1%} ± {share[1]:.1%}"


def _presets(swept: list[Row], full: Full) -> str:
    lines = []
    for preset in PRESETS:
        prune = [b.model_dump() for b in preset_boundaries(preset, _MODEL_LAYERS)]
        name = next(s.name for s in SWEEP if s.prune(_MODEL_LAYERS) == prune)
        mine = groups(swept)[LAZYLLM.name, name]
        bound = statistics.fmean(row.flop_bound for row in mine)
        shares = [_percent(full.share(mine, half)) for half in ("choosing", "reporting")]
        kinds = [f"{full.share(mine, 'reporting', kind)[0]:.0%}" for kind in _KINDS]
        lines.append((f"`{preset}`", name, f"{bound:.2f}x", *shares, *kinds))
    return table(("", "keeps", "bound", "chosen by", "reported", *_KINDS), lines)


def _by_method(rows: list[Row], full: Full, half: str) -> str:
    computed = {r.method: f"{r.mean:.1%}" for r in rows if r.task == COMPUTED}
    lines = []
    for (method, _), mine in groups(rows).items():
        kinds = [f"{full.share(mine, half, kind)[0]:.0%}" for kind in _KINDS]
        agree = [f"{mean_of(mine, half, f'{AGREEMENT}: {name}'):.3f}" for name in _AGREEMENT]
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
    """Share of the full model's score against the FLOP-bound speed-up, a curve a method."""
    reported = [r for r in rows if r.part == "sweep" and r.half == "reporting"]
    curves = defaultdict(dict)
    for (method, schedule), mine in groups(reported).items():
        speed = statistics.fmean(row.flop_bound for row in mine)
        curves[method][schedule] = (speed, *full.share(mine, "reporting"))
    drawn, axes = figure("Answers kept, against how much less a prefill computes")
    axes.axhline(1, color="#888888", label=FULL.name)
    for method, points in curves.items():
        speeds, shares, errors = zip(*sorted(points.values()))
        width = 2.2 if method == LAZYLLM.name else 1.2
        axes.errorbar(
            speeds, shares, errors, marker="o", markersize=4, linewidth=width, label=method
        )
    axes.set(
        xlabel="times fewer operations", ylabel="share of the full model's score", ylim=(0, 1.1)
    )
    axes.legend(fontsize=6, ncols=2, loc="center right")
    drawn.savefig(path, metadata={"Date": None})
