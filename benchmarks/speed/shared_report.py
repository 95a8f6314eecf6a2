"""Plots and tables of shared prefixes and arriving prompts in docs/benchmarks.md, from the results
file alone."""

from pathlib import Path

from benchmarks.results import figure, read, replace_section, table
from benchmarks.speed.cases import BUDGET
from benchmarks.speed.families_report import places
from benchmarks.speed.report import pick, stock_row
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import MEASURED
from benchmarks.speed.shared import (
    ARRIVAL,
    FILE,
    PLAN,
    QUESTION,
    SHARED_PREFIX,
    THROUGHPUT,
    TURN,
)

_ARGUMENTS = {case.benchmark: case.arguments for case in PLAN.cases}
_WHAT = {
    TURN: "second turn, {answer:,} + {more:,} tokens after {tokens:,}",
    QUESTION: "second question, {more:,} tokens after a document of {tokens:,}",
    THROUGHPUT: "{requests:,} requests of {tokens:,} tokens, {max_tokens:,} out",
    SHARED_PREFIX: "the same, sharing {shared:,} of their tokens",
}


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plots beside the results file and rewrite the page's section, which is added at its
    end if it has none. Nothing is done where there is no results file."""
    rows = read(file, Row)
    if not rows:
        return
    again, arrivals = _pairs(rows, TURN, QUESTION), _pairs(rows, ARRIVAL)
    if again:
        labels = [f"{lazy.benchmark}\nafter {lazy.tokens:,} tokens" for _, lazy in again]
        title = f"Time to first token with a cached prefix, {again[0][1].shape}"
        _draw(again, title, labels, file.with_name("again.svg"))
    if arrivals:
        labels = [f"{lazy.tokens:,} tokens" for _, lazy in arrivals]
        title = f"Longest gap between tokens while a prompt arrives, {arrivals[0][1].shape}"
        _draw(arrivals, title, labels, file.with_name("arrival.svg"))
    replace_section(page, "shared", section(rows), "Shared prefixes, and prompts that arrive")


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a table for each kind."""
    again, arrivals = _pairs(rows, TURN, QUESTION), _pairs(rows, ARRIVAL)
    parts = [
        f"{places(rows)} {rows[0].shape} shape, random weights, bf16. The preset "
        f"`{MEASURED.name}` beside stock vLLM at its defaults, both with prefix caching, chunked "
        f"prefill and at most {BUDGET:,} tokens a step (the default of `vllm serve`). No prompt "
        "was asked twice. Medians. `python -m benchmarks shared` measures this.",
    ]
    if again:
        parts += [
            "![Time to first token with a cached prefix](../benchmarks/speed/results/again.svg)",
            "Time to first token of a prompt whose prefix an earlier one had. Cold is the earlier "
            "prompt's. The bound is what LazyLLM must still compute, the new tokens in the first "
            "stage and all later stages, at the speed of its cold prompt.",
            table(
                (
                    "",
                    "stock cold, ms",
                    "stock, ms",
                    "LazyLLM cold, ms",
                    "LazyLLM, ms",
                    "bound, ms",
                    "times the bound",
                    "LazyLLM / stock",
                ),
                [_again(stock, lazy) for stock, lazy in again],
            ),
        ]
    if arrivals:
        parts += [
            "![Longest gap](../benchmarks/speed/results/arrival.svg)",
            f"The longest time between two tokens of {arrivals[0][1].batch} requests that decode, "
            "while a long prompt comes, and that prompt's time to first token.",
            table(
                (
                    "prompt",
                    "stock gap, ms",
                    "LazyLLM gap, ms",
                    "LazyLLM / stock",
                    "stock first token, ms",
                    "LazyLLM first token, ms",
                    "LazyLLM / stock",
                ),
                [_arrival(stock, lazy) for stock, lazy in arrivals],
            ),
        ]
    if through := _pairs(rows, THROUGHPUT, SHARED_PREFIX):
        head = ("output tokens a second", "stock", "LazyLLM", "ratio")
        parts.append(table(head, [_throughput(stock, lazy) for stock, lazy in through]))
    return "\n\n".join(parts)


def _pairs(rows: list[Row], *benchmarks: str) -> list[tuple[Row, Row]]:
    """Stock vLLM's row and LazyLLM's, of each that both were measured on."""
    return [
        (stock_row(rows, lazy), lazy)
        for benchmark in benchmarks
        for lazy in pick(rows, benchmark, engine=MEASURED.name)
    ]


def _what(row: Row) -> str:
    return _WHAT[row.benchmark].format(**_ARGUMENTS[row.benchmark])


def _again(stock: Row, lazy: Row) -> tuple[str, ...]:
    bound = lazy.details["bound"]
    times = (stock.details["cold"], stock.median, lazy.details["cold"], lazy.median, bound)
    ratios = f"{lazy.median / bound:.2f}", f"{lazy.median / stock.median:.2f}"
    return (_what(lazy), *(f"{time:,.1f}" for time in times), *ratios)


def _arrival(stock: Row, lazy: Row) -> tuple[str, ...]:
    cells = [f"{lazy.tokens:,}"]
    for theirs, ours in (
        (stock.median, lazy.median),
        (stock.details["ttft"], lazy.details["ttft"]),
    ):
        cells += [f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}"]
    return tuple(cells)


def _throughput(stock: Row, lazy: Row) -> tuple[str, ...]:
    return _what(lazy), f"{stock.median:,.0f}", f"{lazy.median:,.0f}", f"{lazy.ratio:.2f}x"


def _draw(pairs: list[tuple[Row, Row]], title: str, labels: list[str], path: Path) -> None:
    """Bars in milliseconds, stock vLLM's beside LazyLLM's."""
    plot, axes = figure(title)
    for i, (label, color) in enumerate((("stock vLLM", "#888888"), ("LazyLLM", "#0a6ebd"))):
        left = [at + 0.4 * i - 0.2 for at in range(len(pairs))]
        bars = axes.bar(left, [pair[i].median for pair in pairs], 0.4, color=color, label=label)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2)
    axes.set_xticks(range(len(pairs)), labels)
    axes.set(ylabel="ms")
    axes.margins(y=0.12)
    axes.legend(loc="upper left")  # longer prompts, to the right, take longer
    plot.savefig(path, metadata={"Date": None})
