"""The table of models on several GPUs in docs/benchmarks.md, from the results file alone."""

from pathlib import Path

from benchmarks.results import PLACE, places, read, replace_section, table
from benchmarks.speed.ranks import COLLECTIVES, DECODED, FILE, LENGTHS, PLANS, ROOM
from benchmarks.speed.report import MISSING, pick, stock_row
from benchmarks.speed.results import Row


def main(page: Path, file: Path = FILE) -> None:
    """Rewrite the page's section on several GPUs, which is added at its end if it has none.
    Nothing is done where there is no results file."""
    if rows := read(file, Row):
        replace_section(page, "ranks", section(rows), "Several GPUs")


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a row for each model and engine."""
    found = [(r.shape, r.engine) for r in rows if r.engine != "stock"]
    in_order = [key for name in PLANS for key in dict.fromkeys(found) if key[0] == name]
    head = ["model", "preset"]
    head += [f"first token of {tokens:,}, ms" for tokens in LENGTHS]
    head += [f"time per token, {n} of {DECODED:,}, ms" for n in (1, 16)]
    head += [f"requests of {ROOM:,}"]
    costs = ["model", "preset", "prefill", "of it scores", "decode step", "of it scores"]
    return "\n\n".join(
        (
            f"{places(rows, PLACE)} Tensor parallelism over GPUs of one host. Random weights of "
            "the shapes named, in bf16 but where the name says FP8. Stock vLLM → LazyLLM, medians; "
            "in brackets how many times sooner the first token comes, and the share of the bound "
            "(operations saved) that this is.",
            table(tuple(head), [_line(rows, *key) for key in in_order]),
            f"What the ranks do together, in ms on the first, waiting for the others included: in "
            f"a prefill of {ROOM:,} tokens and in a decode step after {DECODED:,}; and the part "
            "that reduces scores. Stock vLLM → LazyLLM.",
            table(tuple(costs), [line for key in in_order if (line := _costs(rows, *key))]),
        )
    )


def _line(rows: list[Row], shape: str, engine: str) -> tuple[str, ...]:
    cells = [shape, engine]
    for tokens in LENGTHS:
        cells.append(_cell(rows, "ttft", shape=shape, engine=engine, tokens=tokens))
    for batch in (1, 16):
        cells.append(_cell(rows, "decode", shape=shape, engine=engine, batch=batch))
    cells.append(_cell(rows, "memory", digits=0, shape=shape, engine=engine))
    return tuple(cells)


def _cell(rows: list[Row], benchmark: str, digits: int | None = None, **fields) -> str:
    if not (found := pick(rows, benchmark, **fields)):
        return MISSING
    (row,) = found
    if digits is None:
        digits = 1 if row.median > 10 else 2
    text = f"{stock_row(rows, row).median:,.{digits}f} → {row.median:,.{digits}f}"
    if row.flop_bound:
        text += f" ({row.ratio:.2f}x, {row.ratio / row.flop_bound:.0%})"
    return text


def _costs(rows: list[Row], shape: str, engine: str) -> tuple[str, ...]:
    """A line, or nothing where it was not measured."""
    if not (found := pick(rows, COLLECTIVES, shape=shape, engine=engine)):
        return ()
    (row,) = found
    mine, stock = row.details, stock_row(rows, row)
    prefill = f"{stock.median:.1f} → {row.median:.1f}", f"{mine['scores']:.2f}"
    if "decode" not in mine:
        return shape, engine, *prefill, MISSING, MISSING
    step = f"{stock.details['decode']:.2f} → {mine['decode']:.2f}"
    return shape, engine, *prefill, step, f"{max(mine['decode_scores'], 0):.3f}"
