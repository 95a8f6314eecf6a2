"""Plots and the tables of docs/benchmarks.md, from the results file alone."""

from pathlib import Path

from benchmarks.results import figure, read, replace_section, table
from benchmarks.speed.results import FILE, Row
from benchmarks.speed.shapes import BALANCED


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


def section(rows: list[Row]) -> str:
    """Markdown: what was measured, where and when, then a table a benchmark."""
    place = rows[0].environment
    parts = [
        f"One {place['gpu']}, vLLM {place['vllm']}, torch {place['torch']}, Triton "
        f"{place['triton']}; {place['date']}, commit {place['commit']}. bf16, random weights of "
        "the shapes named. Stock vLLM is at its defaults: prefix caching, chunked prefill, "
        "FlashAttention and CUDA graphs. No prompt was asked twice. Medians, with the fastest and "
        "slowest run where there were several.",
        "![Time to first token](../benchmarks/speed/results/ttft.svg)",
        "Time to first token, one request. The bound is how many times fewer floating-point "
        "operations the schedule takes. Shorter prompts than `min_prompt_tokens` are not pruned.",
        table(
            ("shape", "configuration", "prompt", "stock ms", "LazyLLM ms", "speed-up", "bound"),
            [
                (
                    r.shape,
                    r.engine,
                    f"{r.tokens:,}",
                    _ms(stock_row(rows, r)),
                    _ms(r),
                    f"{r.ratio:.2f}x",
                    f"{r.flop_bound:.2f}x" if r.flop_bound else "not pruned",
                )
                for r in rows
                if r.benchmark == "ttft" and r.engine != "stock"
            ],
        ),
        "Time per output token, with revival. A prompt too short to be pruned, and a schedule that "
        "keeps every token, run as in stock vLLM.",
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
                for r in rows
                if r.benchmark == "decode" and r.engine != "stock"
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


def stock_row(rows: list[Row], row: Row) -> Row:
    """Stock vLLM's, beside another engine's."""
    fields = {"shape": row.shape, "tokens": row.tokens, "batch": row.batch}
    return pick(rows, row.benchmark, engine="stock", **fields)[0]


def _ms(row: Row) -> str:
    digits = 1 if row.median > 20 else 2
    median, least, most = (f"{x:,.{digits}f}" for x in (row.median, row.least, row.most))
    return f"{median} ({least}–{most})" if row.runs > 1 else median


def draw_ttft(rows: list[Row], path: Path) -> None:
    """Time to first token against prompt length, with the FLOP bound as a line."""
    lazy = [r for r in pick(rows, "ttft", engine=BALANCED.name) if r.flop_bound]
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
    for s, r in zip(stock, lazy):
        axes.annotate(
            f"{s.median / r.median:.2f}x",
            (r.tokens, r.median),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            fontsize=8,
            color="#0a6ebd",
        )
    axes.set(xscale="log", yscale="log", xlabel="prompt tokens", ylabel="ms")
    axes.set_xticks(tokens, [f"{t:,}" for t in tokens])
    axes.minorticks_off()
    axes.margins(y=0.12)
    axes.legend()
    plot.savefig(path, metadata={"Date": None})


def draw_room(rows: list[Row], path: Path) -> None:
    """Requests that fit in the KV cache at once."""
    lazy = pick(rows, "memory", engine=BALANCED.name)[0]
    stock = stock_row(rows, lazy)
    plot, axes = figure(f"Requests of {lazy.tokens:,} tokens that fit, {lazy.shape}")
    bars = axes.barh(
        ["LazyLLM", "stock vLLM"], [lazy.median, stock.median], color=["#0a6ebd", "#888888"]
    )
    axes.bar_label(bars, fmt="%d", padding=4)
    axes.set(xlabel="requests", xlim=(0, 1.15 * lazy.median))
    plot.savefig(path, metadata={"Date": None})
