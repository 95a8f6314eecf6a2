"""Run the speed benchmarks and write the results file; needs a GPU."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.speed import cases, results

BENCHMARKS = ("ttft", "decode", "memory", "throughput", "profile")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "benchmarks", nargs="*", metavar="|".join(BENCHMARKS), help="which to run; all if none"
    )
    parser.add_argument(
        "--part",
        type=int,
        action="append",
        help="only these engines (0: the first), to go on "
        "with later: the others' rows stay in the results file",
    )
    parser.add_argument("--out", type=Path, default=results.FILE, help="the results file")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a benchmark that there is not."""
    wanted = set(args.benchmarks or BENCHMARKS)
    if unknown := wanted - set(BENCHMARKS):
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {BENCHMARKS}")
    console = Console(width=150)
    parts = [
        lambda report, g=group: cases.side_by_side(g, wanted, report)
        for group in cases.SIDE_BY_SIDE
        if ("ttft" in wanted and group.ttft) or ("decode" in wanted and group.decode)
    ]
    if wanted & {"memory", "throughput", "decode", "profile"}:
        parts.append(lambda report: cases.whole_gpu(wanted, report))
    rows: list[results.Row] = []
    if args.part:
        parts = [part for i, part in enumerate(parts) if i in args.part]
        rows = results.read(args.out) if args.out.exists() else []

    def report(found: results.Row | str) -> None:
        if isinstance(found, str):
            args.out.with_name("profile.txt").write_text(found)
            return
        console.print(_line(found))
        found.environment = results.environment(found.environment, args.commit)
        rows[:] = [row for row in rows if row.key != found.key] + [found]
        results.write(args.out, rows)

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        for part in bar.track(parts, description="engines"):
            part(report)


def _line(row: results.Row) -> str:
    text = f"{row.benchmark:10} {row.shape:12} {row.engine:26} {row.tokens:>7,} x{row.batch:<3} "
    text += f"{row.median:10.2f} {row.unit} ({row.least:.2f} .. {row.most:.2f}, {row.runs} runs)"
    if row.ratio is not None:
        text += f" {row.ratio:.3f} x stock"
    if row.flop_bound:
        text += f", bound {row.flop_bound:.3f}, {row.ratio / row.flop_bound:.3f} of it"
    return text + "".join(f", {name} {value:.2f}" for name, value in row.details.items())
