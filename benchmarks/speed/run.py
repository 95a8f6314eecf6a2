"""Run the speed benchmarks and write the results file; needs a GPU."""

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import results
from benchmarks.speed import cases
from benchmarks.speed.results import FILE, Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = "|".join(cases.BENCHMARKS)
    parser.add_argument("benchmarks", nargs="*", metavar=names, help="which to run; all if none")
    parser.add_argument(
        "--plan",
        type=int,
        action="append",
        metavar="N",
        help="only these of the plans in cases.py (from 0); rows of others stay in the file",
    )
    add_file_arguments(parser, FILE)


def add_file_arguments(parser: argparse.ArgumentParser, file: Path) -> None:
    parser.add_argument("--out", type=Path, default=file, help="the results file")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def add_only_arguments(parser: argparse.ArgumentParser, names: Iterable[str], file: Path) -> None:
    """``--only``, a choice of ``names``, and those of the results file."""
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help=f"only these; rows of others stay in the file: {', '.join(names)}",
    )
    add_file_arguments(parser, file)


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a benchmark or plan that there is not."""
    wanted = set(args.benchmarks or cases.BENCHMARKS)
    if unknown := wanted - set(cases.BENCHMARKS):
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {cases.BENCHMARKS}")
    try:
        plans = cases.plans(wanted, args.plan)
    except IndexError:
        raise SystemExit(f"--plan: no such plan in {cases.__file__}") from None
    partly = args.plan or args.benchmarks
    console = Console(width=150)
    report = recorder(args.out, args.commit, console, keep=bool(partly))
    texts: list[str] = []

    def show(text: str) -> None:
        texts.append(text)
        args.out.with_name("profile.txt").write_text("\n".join(texts))

    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as bar:
        for plan in bar.track(plans, description="plans"):
            cases.run(plan, report, show)


def recorder(out: Path, commit: str | None, console: Console, keep: bool) -> Callable[[Row], None]:
    """What shows a row and writes it to ``out`` at once. ``keep``: the file's other rows stay."""
    rows = results.read(out, Row) if keep else []

    def report(row: Row) -> None:
        console.print(_line(row))
        row.environment = results.environment(row.environment, commit)
        rows[:] = [old for old in rows if old.key != row.key] + [row]
        results.write(out, rows)

    return report


def _line(row: Row) -> str:
    text = f"{row.benchmark:10} {row.shape:20} {row.engine:26} {row.tokens:>7,} x{row.batch:<3} "
    text += f"{row.median:10.2f} {row.unit} ({row.least:.2f} .. {row.most:.2f}, {row.runs} runs)"
    if row.ratio is not None:
        text += f" {row.ratio:.3f} x stock"
    if row.flop_bound:
        text += f", bound {row.flop_bound:.3f}, {row.ratio / row.flop_bound:.3f} of it"
    return text + "".join(f", {name} {value:.2f}" for name, value in row.details.items())
