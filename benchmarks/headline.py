"""The README's figures for the default preset, from the results files alone."""

from pathlib import Path

from benchmarks import results
from benchmarks.quality import results as quality_results
from benchmarks.quality import tables
from benchmarks.quality.report import by_model
from benchmarks.quality.shares import Full
from benchmarks.quality.worst import preset_runs, worst
from benchmarks.speed import report as speed
from benchmarks.speed import results as speed_results
from benchmarks.speed.shapes import BALANCED

_LENGTH, _ROOM_LENGTH = 16384, 32768


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
    """Markdown: first token, room in the KV cache, answers."""
    stock, lazy = _pair(rows, "ttft", _LENGTH)
    held, holds = _pair(rows, "memory", _ROOM_LENGTH)
    scores = _scores(answers)
    place = stock.environment
    return "\n\n".join(
        (
            results.table(
                ("", "stock vLLM", "LazyLLM", ""),
                [
                    (
                        f"First token of a new prompt of {_LENGTH:,} tokens",
                        f"{stock.median:,.0f} ms",
                        f"{lazy.median:,.0f} ms",
                        f"{stock.median / lazy.median:.1f} times sooner",
                    ),
                    (
                        f"Requests of {_ROOM_LENGTH:,} tokens that fit in the KV cache",
                        f"{held.median:,.0f}",
                        f"{holds.median:,.0f}",
                        f"{holds.median / held.median:.1f} times as many",
                    ),
                    *(line for line, _ in scores),
                ],
            ),
            f"The default preset, `{BALANCED.name}`. Speed and room: {stock.shape} shape on one "
            f"{place['gpu']}, stock vLLM {place['vllm']} at its defaults ({place['date']}). "
            f"Answers: {'; '.join(told for _, told in scores)}.",
        )
    )


def _scores(answers: list) -> list[tuple[tuple[str, ...], str]]:
    """By model on which the default preset was measured: the table's line, and of which prompts."""
    full, found = Full(answers), []
    for model, parts in by_model(answers).items():
        run = preset_runs(parts).get(BALANCED.name)
        lowest = worst(full, run.rows, "reporting") if run else None
        if lowest is None:
            continue
        counted = [r for r in run.rows if r.half == "reporting" and full.counts(r)]
        lengths = " and ".join(f"{n:,}" for n in sorted({r.tokens for r in counted}))
        share = tables.percent((lowest.share, lowest.error))
        line = (
            f"Score of {model} over {lowest.counted} tasks, as a share of stock vLLM's",
            "100%",
            tables.percent(full.share(run.rows, "reporting")),
            f"worst task, {lowest.task}: {share}",
        )
        date = max(r.environment["date"] for r in counted)
        found.append((line, f"{model}, prompts of {lengths} tokens ({date})"))
    return found


def _pair(rows: list, benchmark: str, tokens: int) -> tuple:
    """Stock vLLM's row and the default preset's."""
    (lazy,) = speed.pick(rows, benchmark, engine=BALANCED.name, tokens=tokens)
    return speed.stock_row(rows, lazy), lazy
