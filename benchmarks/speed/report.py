"""Plots and the tables of docs/benchmarks.md, from the results file alone."""

from pathlib import Path

from benchmarks.results import figure, places, read, replace_section, table
from benchmarks.speed.cases import BUDGET
from benchmarks.speed.results import FILE, Row
from benchmarks.speed.shapes import MEASURED

MISSING = "–"


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plots beside the results file and rewrite the page's section on speed."""
    rows = read(file, Row)
    draw_ttft(rows, file.with_name("ttft.svg"))
    if pick(rows, "memory"):
        draw_room(rows, file.with_name("room.svg"))
    replace_section(page, "speed", section(rows))


def pick(rows: list[Row], benchmark: str, **fields) -> list[Row]:
    """Rows of a benchmark with these fields."""
    return [
        row
        for row in rows
        if row.benchmark == benchmark and all(getattr(row, k) == v for k, v in fields.items())
    ]


def measured(rows: list[Row]) -> str:
    """The engine that every case is measured with; in older results it has another name."""
    engines = dict.fromkeys(row.engine for row in rows if row.engine != "stock")
    return MEASURED.name if MEASURED.name in engines else next(iter(engines))


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a table a benchmark."""
    decoded = pick(rows, "decode")
    place, elsewhere = places([r for r in rows if r.benchmark != "decode"]), places(decoded)
    shapes = dict.fromkeys(row.shape for row in pick(rows, "ttft"))
    parts = [
        f"{place} bf16, random weights of the shapes named. Stock vLLM is at its defaults: prefix "
        f"caching, chunked prefill, FlashAttention and CUDA graphs. Both have at most {BUDGET:,} "
        "tokens a step, the default of `vllm serve`. No prompt was asked twice. Medians; times per "
        "output token with the fastest and slowest run, where there were several.",
        "![Time to first token](../benchmarks/speed/results/ttft.svg)",
        "Time to first token of one request, and how many times sooner it comes than in stock "
        "vLLM. The bound is how many times fewer floating-point operations the schedule takes. "
        "Shorter prompts than `min_prompt_tokens` are not pruned.",
        *(_first_tokens(rows, shape) for shape in shapes),
        "Time per output token, with revival. A prompt too short to be pruned, and a schedule that "
        "keeps every token, run as in stock vLLM." + f" {elsewhere}" * (elsewhere != place),
        table(
            (
                "configuration",
                "prompt",
                "requests",
                "stock ms",
                "LazyLLM ms",
                "LazyLLM / stock",
                "revived a step",
            ),
            [
                (
                    r.engine,
                    f"{r.tokens:,}",
                    str(r.batch),
                    _ms(stock_row(rows, r)),
                    _ms(r),
                    f"{1 / r.ratio:.3f}",
                    f"{r.details.get('revived', 0):.1f}",
                )
                for r in decoded
                if r.engine != "stock"
            ],
        ),
    ]
    if pick(rows, "memory"):
        parts.append("![Requests that fit](../benchmarks/speed/results/room.svg)")
    more = []
    for benchmark, what in (
        ("memory", "requests of {tokens:,} tokens that fit in the KV cache at once"),
        ("throughput", "output tokens a second, {batch} requests of {tokens:,} tokens at once"),
    ):
        for row in pick(rows, benchmark):
            if row.engine == "stock":
                continue
            stock = stock_row(rows, row)
            more.append(
                (
                    row.engine,
                    what.format(batch=row.batch, tokens=row.tokens),
                    f"{stock.median:,.0f}",
                    f"{row.median:,.0f}",
                    f"{row.ratio:.2f}x",
                )
            )
    if more:
        parts.append(table(("configuration", "", "stock", "LazyLLM", "ratio"), more))
    return "\n\n".join(parts)


def _first_tokens(rows: list[Row], shape: str) -> str:
    """A line for each length of prompt, columns for each configuration."""
    found = pick(rows, "ttft", shape=shape)
    engines = dict.fromkeys(r.engine for r in found if r.engine != "stock")
    main_one = measured(rows)
    head = [f"{shape}: prompt", "stock, ms"]
    for engine in engines:
        head += [f"`{engine}`, ms", "speed-up"]
        if engine == main_one:
            head.append("share of the bound")
    lines = []
    for stock in pick(found, "ttft", engine="stock"):
        cells = [f"{stock.tokens:,}", _median(stock)]
        for engine in engines:
            mine = pick(found, "ttft", engine=engine, tokens=stock.tokens)
            cells += [_median(mine[0]), f"{mine[0].ratio:.2f}x"] if mine else [MISSING] * 2
            if engine == main_one:
                cells.append(_share(mine))
        lines.append(tuple(cells))
    return table(tuple(head), lines)


def _share(found: list[Row]) -> str:
    if not found:
        return MISSING
    (row,) = found
    return f"{row.ratio / row.flop_bound:.0%}" if row.flop_bound else "not pruned"


def stock_row(rows: list[Row], row: Row) -> Row:
    """Stock vLLM's, beside another engine's."""
    fields = {"shape": row.shape, "tokens": row.tokens, "batch": row.batch}
    return pick(rows, row.benchmark, engine="stock", **fields)[0]


def _median(row: Row) -> str:
    return f"{row.median:,.1f}"


def _ms(row: Row) -> str:
    digits = 1 if row.median > 20 else 2
    median, least, most = (f"{x:,.{digits}f}" for x in (row.median, row.least, row.most))
    return f"{median} ({least}–{most})" if row.runs > 1 else median


def draw_ttft(rows: list[Row], path: Path) -> None:
    """Time to first token against prompt length, with the FLOP bound as a line."""
    lazy = [r for r in pick(rows, "ttft", engine=measured(rows)) if r.flop_bound]
    stock = [stock_row(rows, r) for r in lazy]
    plot, axes = figure("Time to first token, " + lazy[0].shape)
    tokens = [r.tokens for r in lazy]
    axes.plot(tokens, [r.median for r in stock], "o-", color="#888888", label="stock vLLM")
    axes.plot(tokens, [r.median for r in lazy], "o-", color="#0a6ebd", label="LazyLLM")
    axes.plot(
        tokens,
        [s.median / r.flop_bound for s, r in zip(stock, lazy)],
        "--",
        color="#d1495b",
        label="stock / FLOP bound",
    )
    shown = _spaced(tokens)
    for s, r in zip(stock, lazy):
        if r.tokens not in shown:
            continue
        axes.annotate(
            f"{s.median / r.median:.2f}x",
            (r.tokens, min(r.median, s.median / r.flop_bound)),  # below both lines
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
            color="#0a6ebd",
        )
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="ms")
    axes.set_xticks(shown, [f"{t:,}" for t in shown])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.legend()
    plot.savefig(path, metadata={"Date": None})


def _spaced(tokens: list[int]) -> list[int]:
    """Those of rising lengths that lie far enough apart, on a logarithmic axis, for labels."""
    shown = tokens[:1]
    for count in tokens:
        if count > 1.9 * shown[-1]:
            shown.append(count)
    return shown


def draw_room(rows: list[Row], path: Path) -> None:
    """Requests that fit in the KV cache at once."""
    found = pick(rows, "memory")
    lazy = pick(found, "memory", engine=measured(found))[0]
    stock = stock_row(rows, lazy)
    plot, axes = figure(f"Requests of {lazy.tokens:,} tokens that fit, {lazy.shape}")
    bars = axes.barh(
        ["LazyLLM", "stock vLLM"], [lazy.median, stock.median], color=["#0a6ebd", "#888888"]
    )
    axes.bar_label(bars, fmt="%d", padding=4)
    axes.set(xlabel="requests", xlim=(0, 1.15 * lazy.median))
    plot.savefig(path, metadata={"Date": None})
