"""One entry point: ``python -m benchmarks speed``, ``python -m benchmarks report``."""

import argparse

from benchmarks.speed import report as speed_report
from benchmarks.speed import run as speed


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("speed", help="LazyLLM beside stock vLLM, on a GPU")
    speed.add_arguments(measured)
    measured.set_defaults(run=speed.main)
    drawn = commands.add_parser("report", help="plots and the README's tables from the results")
    drawn.set_defaults(run=lambda args: speed_report.main())
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
