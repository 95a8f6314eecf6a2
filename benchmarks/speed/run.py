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
    parser.add_argument("--out", type=Path, default=results.FILE, help="the results file")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a benchmark that there is not."""
    wanted = set(args.benchmarks or BENCHMARKS)
    if unknown := wanted - set(BENCHMARKS):
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {BENCHMARKS}")
    console = Console(width=150)
    parts = []
    if wanted & {"ttft", "decode"}:
        for group in cases.SIDE_BY_SIDE:
            if ("ttft" in wanted and group.ttft) or ("decode" in wanted and group.decode):
                parts.append(lambda report, g=group: cases.side_by_side(g, wanted, report))
    if wanted & {"memory", "throughput", "decode"}:
        parts.append(lambda report: cases.whole_gpu(wanted, report))

    rows: list[results.Row] = []
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    )
    with bar:
        task = bar.add_task("speed", total=len(parts))

        def report(row: results.Row) -> None:
            console.print(_line(row))

        for part in parts:
            for row in part(report):
                row.environment = results.environment(row.environment, args.commit)
                rows.append(row)
            bar.advance(task)
            results.write(args.out, rows)
    if "profile" in wanted:
        text, versions = cases.profile()
        place = results.environment(versions, args.commit)
        head = ", ".join(f"{name} {value}" for name, value in place.items())
        args.out.with_name("profile.txt").write_text(f"{head}\n\n{text}")
        console.print(text)


def _line(row: results.Row) -> str:
    text = f"{row.benchmark:10} {row.shape:12} {row.engine:26} {row.tokens:>7,} x{row.batch:<3} "
    text += f"{row.median:10.2f} {row.unit} ({row.least:.2f} .. {row.most:.2f}, {row.runs} runs)"
    if row.ratio is not None:
        text += f" {row.ratio:.3f} x stock"
    if row.flop_bound:
        text += f", bound {row.flop_bound:.3f}, {row.ratio / row.flop_bound:.3f} of it"
    return text + "".join(f", {name} {value:.2f}" for name, value in row.details.items())
