"""Run the speed benchmark of many models, families or ones on several GPUs, and write its results
file; needs GPUs."""

import argparse
import time
from pathlib import Path

from rich.console import Console

from benchmarks.speed import cases
from benchmarks.speed.cases import Plan
from benchmarks.speed.run import add_only_arguments, recorder


def add_arguments(parser: argparse.ArgumentParser, plans: dict[str, Plan], file: Path) -> None:
    """``plans``, by name, are what ``main`` chooses from."""
    add_only_arguments(parser, plans, file)
    parser.set_defaults(plans=plans)


def main(args: argparse.Namespace) -> None:
    """One that fails does not keep the others from being measured. Raises SystemExit for a name
    that there is not, and at the end if any failed."""
    plans = args.plans
    names = args.only or list(plans)
    if unknown := [name for name in names if name not in plans]:
        raise SystemExit(f"no such model: {', '.join(unknown)}; there are {', '.join(plans)}")
    console = Console(width=150)
    report = recorder(args.out, args.commit, console, keep=bool(args.only))
    failed = []
    for name in names:
        began = time.monotonic()
        try:
            cases.run(plans[name], report, console.print)
        except RuntimeError as error:
            console.print(f"{name}: {error}", markup=False)
            failed.append(name)
        console.print(f"{name}: {time.monotonic() - began:.0f} s")
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")
