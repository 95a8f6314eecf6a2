"""Run the speed benchmark of the model families and write its results file; needs a GPU."""

import argparse
import time

from rich.console import Console

from benchmarks.speed import cases
from benchmarks.speed.families import FILE, PLANS
from benchmarks.speed.run import add_only_arguments, recorder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_only_arguments(parser, PLANS, FILE)


def main(args: argparse.Namespace) -> None:
    """One that fails does not keep the others from being measured. Raises SystemExit for a name
    that there is not, and at the end if any failed."""
    names = args.only or list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        raise SystemExit(f"no such model: {', '.join(unknown)}; there are {', '.join(PLANS)}")
    console = Console(width=150)
    report = recorder(args.out, args.commit, console, keep=bool(args.only))
    failed = []
    for name in names:
        began = time.monotonic()
        try:
            cases.run(PLANS[name], report, console.print)
        except RuntimeError as error:
            console.print(f"{name}: {error}", markup=False)
            failed.append(name)
        console.print(f"{name}: {time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
