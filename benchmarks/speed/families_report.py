"""The table of model families in docs/benchmarks.md, from the results file alone."""

from pathlib import Path

from benchmarks.results import places, read, replace_section, table
from benchmarks.speed.families import DECODED, FILE, LONG, PLANS, SHORT
from benchmarks.speed.report import MISSING, measured, pick, stock_row
from benchmarks.speed.results import Row


def main(page: Path, file: Path = FILE) -> None:
    """Rewrite the page's section on families, which is added at its end if it has none. Nothing
    is done where there is no results file."""
    rows = read(file, Row)
    if not rows:
        return
    replace_section(page, "families", section(rows), "Other model families")


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a row for each model."""
    shapes = [name for name in PLANS if any(row.shape == name for row in rows)]
    head = ["model"]
    for tokens in (SHORT, LONG):
        head += [f"first token of {tokens:,}, ms", "speed-up", "bound", "share of it"]
    head += ["time per token", "room"]
    return "\n\n".join(
        (
            f"{places(rows)} Random weights of the shapes named, in bf16 but where the name says "
            f"FP8 (weights, KV cache, or both). The preset `{measured(rows)}` beside stock vLLM: "
            "time to first token of one request, stock → LazyLLM; the bound is how many times "
            "fewer floating-point operations the schedule takes. Time per output token after "
            f"{DECODED:,} tokens, LazyLLM / stock. Requests of {LONG:,} tokens that fit in the KV "
            "cache at once, LazyLLM / stock. Medians.",
            table(tuple(head), [_line(rows, shape) for shape in shapes]),
        )
    )


def _line(rows: list[Row], shape: str) -> tuple[str, ...]:
    cells = [shape]
    for tokens in (SHORT, LONG):
        cells += _first_token(rows, shape, tokens)
    engine = measured(rows)
    decoded = pick(rows, "decode", shape=shape, engine=engine)
    cells.append(f"{1 / decoded[0].ratio:.2f}x" if decoded else MISSING)
    room = pick(rows, "memory", shape=shape, engine=engine)
    cells.append(f"{room[0].ratio:.2f}x" if room else MISSING)
    return tuple(cells)


def _first_token(rows: list[Row], shape: str, tokens: int) -> list[str]:
    found = pick(rows, "ttft", shape=shape, engine=measured(rows), tokens=tokens)
    if not found:
        return [MISSING] * 4
    (row,) = found
    return [
        f"{stock_row(rows, row).median:,.1f} → {row.median:,.1f}",
        f"{row.ratio:.2f}x",
        f"{row.flop_bound:.2f}x",
        f"{row.ratio / row.flop_bound:.0%}",
    ]
