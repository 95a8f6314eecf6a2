"""Plots and tables of shared prefixes and arriving prompts in docs/benchmarks.md, from the results
file alone."""

from pathlib import Path

from benchmarks.results import figure, places, read, replace_section, table
from benchmarks.speed.cases import BUDGET
from benchmarks.speed.report import pick
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import DEEP_ENDS
from benchmarks.speed.shared import (
    ABOUT,
    ARRIVAL,
    AT_ONCE,
    EXTENSION,
    FILE,
    LONG_TURN,
    PLAN,
    QUESTION,
    SHARED_PREFIX,
    THROUGHPUT,
    TURN,
)

_ARGUMENTS = {(c.benchmark, c.arguments["tokens"], c.batch): c.arguments for c in PLAN.cases}
_WHAT = {
    TURN: "second turn, {answer:,} + {more:,} tokens after {tokens:,}",
    LONG_TURN: "second turn, {answer:,} + {more:,} tokens after {tokens:,}",
    QUESTION: "second question, {more:,} tokens after a document of {tokens:,}",
    ABOUT: "the same, where the document was sent alone first",
    AT_ONCE: "{batch} questions of {more:,} tokens about a document of {tokens:,}",
    ARRIVAL: "a prompt of {tokens:,}, beside {batch} requests",
    EXTENSION: "{more:,} tokens after {tokens:,} + {answer:,}, beside {batch} of {decoded:,}",
    THROUGHPUT: "{requests:,} requests of {tokens:,} tokens, {max_tokens:,} out",
    SHARED_PREFIX: "the same, sharing {shared:,} of their tokens",
}
_LABEL = {
    TURN: "second turn\nafter {tokens:,}",
    LONG_TURN: "{more:,} tokens\nafter {tokens:,}",
    QUESTION: "second question\nafter {tokens:,}",
    ABOUT: "document of\n{tokens:,} alone first",
    ARRIVAL: "{tokens:,} tokens",
    EXTENSION: "{more:,} tokens\nafter {tokens:,}",
}
_COLORS = ("#888888", "#0a6ebd", "#d1495b", "#2a9d8f")


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plots beside the results file and rewrite the page's section, which is added at its
    end if it has none. Nothing is done where there is no results file."""
    rows = read(file, Row)
    if not rows:
        return
    for name, title, benchmarks in (
        ("again", "Time to first token with a cached prefix", (TURN, LONG_TURN, QUESTION, ABOUT)),
        ("arrival", "Longest gap between tokens while a prompt arrives", (ARRIVAL, EXTENSION)),
    ):
        if cases := _cases(rows, *benchmarks):
            _draw(cases, f"{title}, {rows[0].shape}", file.with_name(f"{name}.svg"))
    replace_section(page, "shared", section(rows), "Shared prefixes, and prompts that arrive")


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a table for each kind."""
    engines = list(dict.fromkeys(row.engine for row in rows if row.engine != "stock"))
    parts = [
        f"{places(rows)} {rows[0].shape} shape, random weights, bf16. "
        f"{' and '.join(f'`{engine}`' for engine in engines)} beside stock vLLM at its defaults, "
        f"all with prefix caching, chunked prefill and at most {BUDGET:,} tokens a step (the "
        "default of `vllm serve`). No prompt was asked twice. Medians. `python -m benchmarks "
        "shared` measures this.",
    ]
    if again := _cases(rows, TURN, LONG_TURN, QUESTION, ABOUT):
        parts += [
            "![Time to first token with a cached prefix](../benchmarks/speed/results/again.svg)",
            "Time to first token of a prompt whose prefix an earlier one had. Cold is the earlier "
            "prompt's. The bound is what LazyLLM must still compute, the new tokens in the first "
            "stage and all later stages, at the speed of its cold prompt." + _of_deep(engines),
            table(
                (
                    "",
                    "configuration",
                    "stock, ms",
                    "LazyLLM cold, ms",
                    "LazyLLM, ms",
                    "bound, ms",
                    "times the bound",
                    "LazyLLM / stock",
                ),
                [_again(lazy) for _, *others in again for lazy in others],
            ),
        ]
    if arrivals := _cases(rows, ARRIVAL, EXTENSION):
        parts += [
            "![Longest gap](../benchmarks/speed/results/arrival.svg)",
            "The longest time between two tokens of requests that decode, while a prompt comes, "
            "and that prompt's time to first token.",
            table(
                (
                    "",
                    "configuration",
                    "stock gap, ms",
                    "LazyLLM gap, ms",
                    "LazyLLM / stock",
                    "stock first token, ms",
                    "LazyLLM first token, ms",
                    "LazyLLM / stock",
                ),
                [_arrival(lazy) for _, *others in arrivals for lazy in others],
            ),
        ]
    if at_once := _cases(rows, AT_ONCE):
        head = ("first tokens of questions that come at once, ms on average (the last one's)",)
        lines = [_at_once(lazy) for _, *others in at_once for lazy in others]
        parts.append(table((*head, "configuration", "stock", "LazyLLM", "LazyLLM / stock"), lines))
    if through := _cases(rows, THROUGHPUT, SHARED_PREFIX):
        head = ("output tokens a second", "configuration", "stock", "LazyLLM", "ratio")
        lines = [_throughput(lazy) for _, *others in through for lazy in others]
        parts.append(table(head, lines))
    return "\n\n".join(parts)


def _of_deep(engines: list[str]) -> str:
    deep = [engine for engine in engines if engine.endswith(DEEP_ENDS)]
    if not deep:
        return ""
    return (
        f" With `{deep[0]}` a prompt goes on from what an earlier one kept, if it begins with "
        "all of it: then the bound is its new tokens in all layers. A question that came with "
        "its document leaves nothing that another question begins with."
    )


def _cases(rows: list[Row], *benchmarks: str) -> list[list[Row]]:
    """Of each case stock vLLM's row, then LazyLLM's."""
    return [
        [stock, *(r for r in alike if r.engine != "stock")]
        for benchmark in benchmarks
        for stock in pick(rows, benchmark, engine="stock")
        for alike in [pick(rows, benchmark, tokens=stock.tokens, batch=stock.batch)]
    ]


def _told(row: Row, words: dict[str, str]) -> str:
    """A text of the case's arguments."""
    return words[row.benchmark].format(**_ARGUMENTS[row.benchmark, row.tokens, row.batch])


def _begin(row: Row) -> tuple[str, str]:
    """A line's first two cells."""
    return _told(row, _WHAT), f"`{row.engine}`"


def _of_stock(lazy: Row) -> float:
    """Stock vLLM's time, in the same call."""
    return lazy.median * lazy.ratio


def _again(lazy: Row) -> tuple[str, ...]:
    bound = lazy.details["bound"]
    times = (_of_stock(lazy), lazy.details["cold"], lazy.median, bound)
    ratios = f"{lazy.median / bound:.2f}", f"{1 / lazy.ratio:.2f}"
    return (*_begin(lazy), *(f"{time:,.1f}" for time in times), *ratios)


def _arrival(lazy: Row) -> tuple[str, ...]:
    cells = []
    for theirs, ours in (
        (_of_stock(lazy), lazy.median),
        (lazy.details["stock_ttft"], lazy.details["ttft"]),
    ):
        cells += [f"{theirs:,.0f}", f"{ours:,.0f}", f"{ours / theirs:.2f}"]
    return (*_begin(lazy), *cells)


def _at_once(lazy: Row) -> tuple[str, ...]:
    times = f"{_of_stock(lazy):,.1f}", f"{lazy.median:,.1f} ({lazy.details['longest']:,.1f})"
    return (*_begin(lazy), *times, f"{1 / lazy.ratio:.2f}")


def _throughput(lazy: Row) -> tuple[str, ...]:
    speeds = f"{lazy.median / lazy.ratio:,.0f}", f"{lazy.median:,.0f}"
    return (*_begin(lazy), *speeds, f"{lazy.ratio:.2f}x")


def _draw(cases: list[list[Row]], title: str, path: Path) -> None:
    """Bars in milliseconds, a group for each case, of stock vLLM and LazyLLM."""
    plot, axes = figure(title)
    engines = list(dict.fromkeys(row.engine for case in cases for row in case))
    width = 0.8 / len(engines)
    for i, (engine, color) in enumerate(zip(engines, _COLORS)):
        found = [
            (at, r.median) for at, case in enumerate(cases) for r in case if r.engine == engine
        ]
        left = [at + width * (i - (len(engines) - 1) / 2) for at, _ in found]
        label = "stock vLLM" if engine == "stock" else f"LazyLLM, {engine}"
        bars = axes.bar(left, [time for _, time in found], width, color=color, label=label)
        axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
    axes.set_xticks(range(len(cases)), [_told(case[0], _LABEL) for case in cases], fontsize=8)
    axes.set(ylabel="ms")
    axes.margins(y=0.12)
    axes.legend(loc="best", fontsize=8)
    plot.savefig(path, metadata={"Date": None})
