"""The README's figures for the default preset, from the results files alone."""

from pathlib import Path

from benchmarks import results
from benchmarks.quality import report as quality
from benchmarks.quality import results as quality_results
from benchmarks.quality.shares import Full
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
    full = Full(answers)
    swept = [row for row in answers if row.part == "sweep"]
    mine = quality.preset_rows(swept, BALANCED.name)
    mean, error = full.share(mine, "reporting")
    tasks = {row.task for row in mine if row.half == "reporting"}
    shares = {task: full.share(mine, "reporting", task)[0] for task in tasks}
    worst = min((task for task in tasks if shares[task] == shares[task]), key=shares.get)
    place, judged = stock.environment, answers[0].environment
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
                    (
                        "Score over eight tasks, as a share of stock vLLM's",
                        "100%",
                        f"{mean:.1%} ± {error:.1%}",
                        f"worst task, {worst}: {shares[worst]:.0%}",
                    ),
                ],
            ),
            f"The default preset, `{BALANCED.name}`. Speed and room: {stock.shape} shape on one "
            f"{place['gpu']}, stock vLLM {place['vllm']} at its defaults ({place['date']}). "
            f"Answers: SmolLM2-135M, prompts of 1,000 and 2,000 tokens ({judged['date']}).",
        )
    )


def _pair(rows: list, benchmark: str, tokens: int) -> tuple:
    """Stock vLLM's row and the default preset's."""
    (lazy,) = speed.pick(rows, benchmark, engine=BALANCED.name, tokens=tokens)
    return speed.stock_row(rows, lazy), lazy
