"""Plots and tables of servers under load in docs/benchmarks.md, from the results file alone."""

from pathlib import Path

from benchmarks.loads.cases import LARGE
from benchmarks.loads.results import FILE, Row
from benchmarks.results import panels, places, read, replace_section, table

_COLORS = ("#888888", "#0a6ebd", "#d1495b")
_HEAD = (
    "a second",
    "configuration",
    "requests",
    "went on",
    "first token, ms",
    "P99",
    "between tokens, P99, ms",
    "tokens/s",
)


def main(page: Path, file: Path = FILE) -> None:
    """Draw a plot a load beside the results file and rewrite the page's section, which is added at
    its end if it has none. Nothing is done where there is no results file."""
    rows = read(file, Row)
    if not rows:
        return
    for name, of_load in _by_load(rows).items():
        _draw(of_load, file.with_name(f"{name}.svg"))
    replace_section(page, "loads", section(rows), "Servers under load")


def _by_load(rows: list[Row]) -> dict[str, list[Row]]:
    """By a load's short name, those that were measured."""
    found = {name: [r for r in rows if r.load == load.name] for name, load in LARGE.items()}
    return {name: of_load for name, of_load in found.items() if of_load}


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then plot and table of each load."""
    seconds = " or ".join(f"{s:g}" for s in dict.fromkeys(row.seconds for row in rows))
    parts = [
        f"{places(rows)} {rows[0].shape} shape, random weights. `vllm serve` at its defaults, "
        "stock and with LazyLLM, each on one GPU. Requests arrive as a Poisson "
        f"process for {seconds} s at each rate, the same ones at every server; at the highest "
        "rate stock vLLM has about all that it can do. Times are the client's; beside them, how "
        "many times stock vLLM's. Went on: requests that began with what an earlier one kept "
        "(`reuse: deep`). `python -m benchmarks loads` measures this.",
    ]
    for name, of_load in _by_load(rows).items():
        of_load = sorted(of_load, key=lambda row: row.rate)  # engines in the order of the file
        parts += [
            f"{LARGE[name].told}.",
            f"![{LARGE[name].name}](../benchmarks/loads/results/{name}.svg)",
            table(_HEAD, [_line(row, of_load) for row in of_load]),
        ]
    return "\n\n".join(parts)


def _line(row: Row, rows: list[Row]) -> tuple[str, ...]:
    stock = next((r for r in rows if r.engine == "stock" and r.rate == row.rate), None)

    def cell(name: str) -> str:
        value = getattr(row, name)
        if stock is None or stock is row:
            return f"{value:,.0f}"
        return f"{value:,.0f} ({value / getattr(stock, name):.2f})"

    figures = (cell(name) for name in ("ttft", "ttft_p99", "gap_p99", "speed"))
    return f"{row.rate:g}", f"`{row.engine}`", str(row.requests), str(row.reuses), *figures


def _draw(rows: list[Row], path: Path) -> None:
    """Against the rate: time to first token, time between tokens, tokens a second."""
    title = f"{rows[0].load}, {rows[0].shape}"
    plot, (first, gap, speed) = panels(title, 3)
    for engine, color in zip(dict.fromkeys(row.engine for row in rows), _COLORS):
        mine = sorted((r for r in rows if r.engine == engine), key=lambda row: row.rate)
        rates = [row.rate for row in mine]
        style = {"color": color, "markersize": 4}
        first.plot(rates, [row.ttft for row in mine], "o-", label=engine, **style)
        first.plot(rates, [row.ttft_p99 for row in mine], "o--", **style)
        gap.plot(rates, [row.gap_p99 for row in mine], "o--", **style)
        speed.plot(rates, [row.speed for row in mine], "o-", **style)
    first.set(ylabel="first token, ms: mean, P99 dashed", yscale="log")
    gap.set(ylabel="between tokens, ms: P99", yscale="log")
    speed.set(ylabel="output tokens/s", ylim=(0, None))
    for axes in (first, gap, speed):
        axes.set(xlabel="a second", xlim=(0, None))
    first.legend(fontsize=8)
    plot.savefig(path, metadata={"Date": None})
