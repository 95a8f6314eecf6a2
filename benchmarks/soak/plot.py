"""A soak's results file as a plot and as a section of the docs."""

import json
from pathlib import Path

from benchmarks.results import replace_section, stack, table

FILE = Path(__file__).parent / "results/soak.json"
PLOT = "soak.svg"


def main(page: Path, file: Path = FILE) -> None:
    """Draw the plot beside the results file and rewrite the page's section; nothing if there is no
    file."""
    if not file.exists():
        return
    told = json.loads(file.read_text())
    draw(told, file.with_name(PLOT))
    replace_section(page, "soak", section(told, file.with_name(PLOT)))


def draw(told: dict, path: Path) -> None:
    """Args:
    told: what the results file has; path: of the SVG.
    """
    columns = dict(zip(told["samples"]["columns"], zip(*told["samples"]["rows"])))
    if not columns:
        return
    minutes = [at / 60 for at in columns["at"]]
    plot, axes = stack("soak", 5)
    memory, load, cache, first, following = axes
    for name, label in (("host", "server's processes"), ("gpu", "GPU")):
        if None not in columns[name]:
            memory.plot(minutes, [v / 1024 for v in columns[name]], label=label)
    for name in ("running", "waiting"):
        load.plot(minutes, columns[name], label=name)
    cache.plot(minutes, columns["kv_cache"])
    for axis, what in ((first, "ttft"), (following, "itl")):
        bins = [one for one in told["minutes"] if one[what]]
        for of, label in (("median", "median"), ("p99", "99th percentile")):
            axis.plot(
                [one["minutes"] for one in bins], [one[what][of] for one in bins], label=label
            )
    labels = ("memory, GiB", "requests", "KV cache in use", "first token, ms", "between tokens, ms")
    for axis, label in zip(axes, labels):
        axis.set_ylabel(label, fontsize=8)
        axis.set_ylim(bottom=0)
        axis.tick_params(labelsize=7)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7, frameon=False)
    axes[-1].set_xlabel("minutes", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    plot.savefig(path, metadata={"Date": None})


def section(told: dict, plot: Path) -> str:
    """Markdown."""
    place, sums = told["environment"], told["sums"]
    head = (
        f"{told['minutes_run']:.0f} minutes on one {place['gpu']}, vLLM {place['vllm']}, "
        f"{told['arguments']['model']}, {place['date']}, commit {place['commit']}: "
        f"{sums['requests']:,} requests, {sums['left']:,} of which their clients left, "
        f"{sums['prompt_tokens']:,} prompt tokens, {sums['generation_tokens']:,} generated, "
        f"{sums['preemptions']:,} preemptions."
    )
    lines = [
        (f["name"], {True: "good", False: "**bad**", None: ""}[f["is_good"]], f["why"])
        for f in told["findings"]
    ]
    shown = f"![Soak](../benchmarks/soak/results/{plot.name})"
    return "\n\n".join((head, table(("", "", ""), lines), shown))
