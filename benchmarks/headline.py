"""The README's figures for the presets, from the results files alone."""

from pathlib import Path

from benchmarks import results
from benchmarks.quality import results as quality_results
from benchmarks.quality import tables
from benchmarks.quality.report import by_model
from benchmarks.quality.shares import Full, told_half
from benchmarks.quality.worst import FLOOR, Run, preset_runs, worst
from benchmarks.speed import report as speed
from benchmarks.speed import results as speed_results
from benchmarks.speed.shapes import AGGRESSIVE, BALANCED, CONSERVATIVE, SHAPES, Pruning
from lazyllm_vllm.plan.operations import flop_bound
from lazyllm_vllm.plan.presets import DEFAULT

_SHAPE, _LENGTH, _ROOM_LENGTH = "Llama-3.1-8B", 16384, 32768
_PRESETS = (CONSERVATIVE, BALANCED, AGGRESSIVE)
_NOT = "not measured"


def main(
    readme: Path,
    speed_file: Path = speed_results.FILE,
    quality_file: Path = quality_results.FILE,
) -> None:
    """Rewrite the README's section "figures"."""
    rows = results.read(speed_file, speed_results.Row)
    answers = results.read(quality_file, quality_results.Row)
    results.replace_section(readme, "figures", section(rows, answers))


def section(rows: list, answers: list) -> str:
    """Markdown: a column a preset."""
    scores = _scores(answers)
    stock = speed.pick(rows, "ttft", engine="stock", tokens=_LENGTH)
    stock += speed.pick(rows, "memory", engine="stock", tokens=_ROOM_LENGTH)
    form = "one {gpu}, stock vLLM {vllm} at its defaults ({date})"
    places = results.places(stock, form, ", the room on ")
    names = (f"`{p.name}`" + ", the default" * (p.name == DEFAULT) for p in _PRESETS)
    return "\n\n".join(
        (
            results.table(
                ("", "stock vLLM", *names),
                [
                    (
                        f"Operations for the first token of {_LENGTH:,} tokens",
                        "",
                        *(_fewer(p) for p in _PRESETS),
                    ),
                    _measured(
                        rows, "ttft", _LENGTH, f"First token of {_LENGTH:,} new tokens", " ms"
                    ),
                    _measured(
                        rows, "memory", _ROOM_LENGTH, f"Requests of {_ROOM_LENGTH:,} that fit", ""
                    ),
                    *(line for lines, _ in scores for line in lines),
                ],
            ),
            f"Speed and room: {_SHAPE} shape on {places}. "
            f"Answers: {'; '.join(told for _, told in scores)}.",
        )
    )


def _fewer(preset: Pruning) -> str:
    shape = SHAPES[_SHAPE]
    return f"{flop_bound(shape, preset.cuts(shape), _LENGTH):.1f} times fewer"


def _measured(rows: list, benchmark: str, tokens: int, title: str, unit: str) -> tuple[str, ...]:
    """Stock vLLM's figure, and each preset's with its ratio."""
    (stock,) = speed.pick(rows, benchmark, engine="stock", tokens=tokens)

    def cell(preset: str) -> str:
        mine = speed.pick(rows, benchmark, engine=preset, tokens=tokens)
        if not mine:
            return _NOT
        pair = (stock.median, mine[0].median)
        return f"{mine[0].median:,.0f}{unit}, {max(pair) / min(pair):.1f} times"

    return (title, f"{stock.median:,.0f}{unit}", *(cell(p.name) for p in _PRESETS))


def _scores(answers: list) -> list[tuple[list[tuple[str, ...]], str]]:
    """By model on which a preset was measured: the table's lines, and of which prompts."""
    full, found = Full(answers), []
    for model, parts in by_model(answers).items():
        measured = preset_runs(parts)
        rows = [r for run in measured.values() for r in run.rows]
        half = told_half(rows)
        counted = [r for r in rows if r.half == half and full.counts(r)]
        if not counted:
            continue
        of = [measured.get(p.name) for p in _PRESETS]
        worst_tasks, under = zip(*(_worst(full, run, half) for run in of))
        count = len({r.task for r in counted})
        lines = [
            (
                f"Mean score of {model} over {count} tasks",
                "100%",
                *(tables.percent(full.share(run.rows, half)) if run else _NOT for run in of),
            ),
            ("Its worst task", "100%", *worst_tasks),
            (f"Tasks under {FLOOR:.0%}", "", *under),
        ]
        lengths = " and ".join(f"{n:,}" for n in sorted({r.tokens for r in counted}))
        date = max(r.environment["date"] for r in counted)
        samples = f"{min(r.samples for r in counted)} of each task"
        found.append((lines, f"{model}, {samples}, prompts of {lengths} tokens ({date})"))
    return found


def _worst(full: Full, run: Run | None, half: str) -> tuple[str, str]:
    """A preset's worst task, and how many fall."""
    found = worst(full, run.rows, half) if run else None
    if not found:
        return _NOT, _NOT
    share = tables.percent((found.share, found.error))
    return f"{found.task}, {share}", f"{len(found.under)} of {found.counted}"
