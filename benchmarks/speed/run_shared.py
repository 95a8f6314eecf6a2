"""Run the speed benchmark of shared prefixes and arriving prompts; needs a GPU."""

import argparse
from dataclasses import replace

from rich.console import Console

from benchmarks.speed import cases
from benchmarks.speed.run import add_only_arguments, recorder
from benchmarks.speed.shared import BENCHMARKS, FILE, PLAN


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_only_arguments(parser, BENCHMARKS, FILE)


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit for a name that there is not."""
    names = args.only or BENCHMARKS
    if unknown := set(names) - set(BENCHMARKS):
        raise SystemExit(f"no such benchmark: {', '.join(unknown)}; there are {BENCHMARKS}")
    console = Console(width=150)
    plan = replace(PLAN, cases=tuple(c for c in PLAN.cases if c.benchmark in names))
    cases.run(plan, recorder(args.out, args.commit, console, keep=bool(args.only)), console.print)
