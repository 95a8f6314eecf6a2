"""One entry point: ``python -m benchmarks --help`` tells what there is."""

import argparse
from pathlib import Path

from benchmarks import headline
from benchmarks.loads import report as loads_report
from benchmarks.loads import run as loads
from benchmarks.quality import report as quality_report
from benchmarks.quality import reuse_report
from benchmarks.quality import run as quality
from benchmarks.soak import plot as soak_plot
from benchmarks.soak import run as soak
from benchmarks.speed import (
    families,
    families_report,
    ranks,
    ranks_report,
    run_families,
    run_shared,
    shared_report,
)
from benchmarks.speed import report as speed_report
from benchmarks.speed import run as speed

ROOT = Path(__file__).parents[1]


def report() -> None:
    """Plots and tables wherever they are shown."""
    speed_report.main(ROOT / "docs/benchmarks.md")
    shared_report.main(ROOT / "docs/benchmarks.md")
    families_report.main(ROOT / "docs/benchmarks.md")
    ranks_report.main(ROOT / "docs/benchmarks.md")
    loads_report.main(ROOT / "docs/benchmarks.md")
    quality_report.main(ROOT / "docs/quality.md")
    reuse_report.main(ROOT / "docs/quality.md")
    headline.main(ROOT / "README.md")
    soak_plot.main(ROOT / "docs/endurance.md")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)
    measured = commands.add_parser("speed", help="LazyLLM beside stock vLLM, on a GPU")
    speed.add_arguments(measured)
    measured.set_defaults(run=speed.main)
    shared = commands.add_parser("shared", help="shared prefixes and arriving prompts, on a GPU")
    run_shared.add_arguments(shared)
    shared.set_defaults(run=run_shared.main)
    others = commands.add_parser("families", help="the same for other model families, in short")
    run_families.add_arguments(others, families.PLANS, families.FILE)
    others.set_defaults(run=run_families.main)
    several = commands.add_parser("ranks", help="the same on several GPUs of one host")
    run_families.add_arguments(several, ranks.PLANS, ranks.FILE)
    several.set_defaults(run=run_families.main)
    served = commands.add_parser("loads", help="servers under Poisson loads, on a GPU")
    loads.add_arguments(served)
    served.set_defaults(run=loads.main)
    judged = commands.add_parser("quality", help="answers with LazyLLM beside the full model's")
    quality.add_arguments(judged)
    judged.set_defaults(run=quality.main)
    endured = commands.add_parser("soak", help="mixed load on one server for a long time")
    soak.add_arguments(endured)
    endured.set_defaults(run=soak.main)
    drawn = commands.add_parser(
        "report", help="plots and tables of README and docs, from the results files"
    )
    drawn.set_defaults(run=lambda args: report())
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
