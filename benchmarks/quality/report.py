"""Plots and tables of docs/quality.md, from the results file alone.

``python -m benchmarks.quality.report FILE`` prints them for another results file, without plots.
"""

import sys
from pathlib import Path

from benchmarks.quality import frontier, tables
from benchmarks.quality.choice import FLOORS, HALVES, candidates, choose
from benchmarks.quality.results import FILE, LONGER, Row
from benchmarks.quality.schedules import COMPARED
from benchmarks.quality.shares import LEAST, Full, is_task, told_half
from benchmarks.quality.worst import FLOOR, Run, preset_runs, runs, worst
from benchmarks.results import read, replace_section, table
from lazyllm_vllm.plan.presets import DEFAULT

_PLOTS = "../benchmarks/quality/results"


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plots beside the results file, rewrite the page's section on quality, and print the
    worst tasks of the presets and what presets might be."""
    rows = read(file, Row)
    if not rows:
        return
    full = Full(rows)
    for model, parts in by_model(rows).items():
        measured = [run for part in ("sweep", "rivals") for run in runs(parts.get(part, []))]
        frontier.draw(measured, preset_runs(parts), full, file.parent, model)
    replace_section(page, "quality", section(rows, full))
    print("\n".join(summary(rows, full)))


def by_model(rows: list[Row]) -> dict[str, dict[str, list[Row]]]:
    """Rows by model and part."""
    found: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        found.setdefault(row.model, {}).setdefault(row.part, []).append(row)
    return found


def section(rows: list[Row], full: Full, plots: str | None = _PLOTS) -> str:
    """Markdown.

    Args:
        plots: where the page finds them; None: nowhere.
    """
    sections = [
        "Seeds are split into a half for choosing defaults and one for reporting them. A task "
        f"counts at the lengths at which the full model scores at least {LEAST:g}. Its share is "
        "that of the full model's score, over these lengths together, ± the standard error over "
        "samples that both answer. The worst task is the one with the lowest share: of many tasks "
        "the lowest is in part bad luck, so look at the other half too. The mean is the share of "
        "the mean score. The bound is how many times fewer operations a prefill takes. Requests "
        "run in batches, and each may revive what it could alone.",
        _choice(rows, full),
    ]
    for model, parts in by_model(rows).items():
        sections += [f"### {model}", *_of_model(model, parts, full, plots)]
    return "\n\n".join(sections)


def summary(rows: list[Row], full: Full) -> list[str]:
    """Lines to print: each preset's worst task on each model, and which schedules hold."""
    lines = []
    for model, parts in by_model(rows).items():
        for preset, run in preset_runs(parts).items():
            told = [_in_words(full, run, half) for half in HALVES]
            lines.append(f"{model}, {preset}: worst task, {'; '.join(told)}")
    found, left_out = candidates(rows, full)
    for floor in FLOORS:
        best = choose(found, floor)
        told = f"{best.bound:.2f}x, {best.schedule}" if best else "no schedule"
        lines.append(
            f"worst task at least {floor:.0%} everywhere: {told} ({len(found)} of "
            f"{len(found) + left_out} schedules measured everywhere)"
        )
    return lines


def _in_words(full: Full, run: Run, half: str) -> str:
    found = worst(full, run.rows, half)
    if not found:
        return f"{half}: none counts"
    under = f"{len(found.under)} of {found.counted} tasks under {FLOOR:.0%}"
    return f"{half}: {found.task} {tables.percent((found.share, found.error))}, {under}"


def _choice(rows: list[Row], full: Full) -> str:
    """What presets might be, by the worst task."""
    found, left_out = candidates(rows, full)
    lines = []
    for floor in FLOORS:
        line = [f"{floor:.0%}"]
        for errors in (0, 2):
            best = choose(found, floor, errors)
            if best:
                at = best.worst
                told = f"{at.task}, {tables.percent((at.share, at.error))}"
                line += [best.schedule, f"{best.bound:.2f}x", told]
            else:
                line += ["none", "", ""]
        lines.append(tuple(line))
    head = ("of the worst task", "fastest that holds", "bound", "its worst")
    return (
        f"By the worst task on {' and '.join(by_model(rows))}, in both halves: of {len(found)} "
        "schedules of the sweep, the one with the largest bound that keeps so much (of several "
        f"models, the lowest bound). {left_out} more were not measured on all that counts. On the "
        "right, the same with two standard errors in each task's favour, which lets more through "
        "the fewer samples there are:\n\n"
        + table((*head, "with two errors", "bound", "its worst"), lines)
    )


def _of_model(model: str, parts: dict[str, list[Row]], full: Full, plots: str | None) -> list[str]:
    """Of all that was measured; a part that was not is left out."""
    swept = parts.get("sweep", [])
    presets = preset_runs(parts)
    sections = [_facts(parts, full)]
    if plots and swept:
        sections += [
            f"![{title}]({frontier.plot_file(Path(plots), kind, model)})"
            for kind, title in (("worst", "Worst task"), ("mean", "Mean over tasks"))
        ]
    told = told_half([r for run in presets.values() for r in run.rows] or swept)
    if presets:
        rows = [r for run in presets.values() for r in run.rows]
        sections += [
            f"The presets ({tables.samples(rows)}):",
            tables.presets(presets, full),
            f"By task, on the samples for {told}:",
            tables.by_task(presets, full, parts.get("full", []), told),
        ]
    if default := presets.get(DEFAULT):
        sections += [
            f"`{DEFAULT}`, the default, by task and length, on the samples for {told}:",
            tables.by_length(default, full, told),
        ]
    at = [r for r in swept if r.schedule == COMPARED.name]
    named = {"LazyLLM": "the defaults"}
    pools = [r for r in parts.get("pools", []) if r.schedule == COMPARED.name]
    for rows, half, title in (
        (at, told, f"Ways to drop tokens, all keeping {COMPARED.name} (layers)"),
        (tables.with_defaults(at, pools), "choosing", f"Neighbours that are kept, {COMPARED.name}"),
        (tables.with_defaults(at, parts.get("scores")), "choosing", "Ways to score"),
        (tables.with_defaults(at, parts.get("options")), "choosing", "One default changed"),
        (parts.get("revival"), told, "What revival buys, each with all of the budget"),
        (swept + parts.get("mass", []), "choosing", "Schedules, and how much by the prompt"),
    ):
        if rows and len(runs(rows)) > 1:
            rows = tables.comparable(rows)
            named_here = named if half == "choosing" else {}
            sections += [
                f"{title}, on the samples for {half} ({tables.samples(rows)}):",
                tables.by_method(runs(rows), full, half, named_here),
            ]
    if rivals := parts.get("rivals"):
        rows = tables.comparable(rivals)
        for title, equal in tables.at_equal_operations(runs(rows)):
            sections += [
                f"{title}, on the samples for reporting ({tables.samples(rows)}):",
                tables.by_method(equal, full, "reporting"),
            ]
    if kept := tables.kept([run for part in parts.values() for run in runs(part)]):
        sections += ["What share of each prompt was computed:", kept]
    if longer := parts.get(LONGER):
        sections += [
            f"Longer prompts, on the samples for reporting ({tables.samples(longer)}):",
            tables.longer(longer),
        ]
    if abilities := [r for r in parts.get("abilities", []) if r.half == "reporting"]:
        sections += [
            "What the full model can do, by prompt length, on the samples for reporting "
            f"({tables.samples(abilities)}):",
            tables.abilities(abilities),
        ]
    return sections


def _facts(parts: dict[str, list[Row]], full: Full) -> str:
    rows = [r for part in parts.values() for r in part]
    told = {
        name: ", ".join(sorted({str(r.environment.get(name, "unknown")) for r in rows}))
        for name in ("gpu", "date", "commit")
    }
    asked = [r for r in parts.get("full", []) if is_task(r)]
    lengths = " and ".join(f"{n:,}" for n in sorted({r.tokens for r in asked}))
    tasks = dict.fromkeys(r.task for r in asked)
    counted = {r.task for r in asked if full.counts(r)}
    others = [task for task in tasks if task not in counted]
    return (
        f"bf16, on {told['gpu']}; {told['date']}, commits {told['commit']}. {len(tasks)} tasks of "
        f"{lengths} tokens, of which {len(counted)} count"
        + (f" (not {', '.join(others)})." if others else ".")
    )


if __name__ == "__main__":
    measured = read(Path(sys.argv[1]), Row)
    print(section(measured, Full(measured), None))
