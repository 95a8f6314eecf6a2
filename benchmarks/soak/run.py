"""``python -m benchmarks soak``: starts a server, loads it, and says whether it endured."""

import argparse
import asyncio
import json
import shlex
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cpu import use_cpu_settings
from benchmarks.serving import tiny
from benchmarks.serving.server import ServerError, serving
from benchmarks.soak import plot
from benchmarks.soak.jobs import LARGE, SMALL, Jobs, Sizes
from benchmarks.soak.load import Load, Pace
from benchmarks.soak.report import Report
from benchmarks.speed.shapes import SHAPES, parked_pages
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.operations import full_layers
from lazyllm_vllm.plan.request_setting import SettingError
from lazyllm_vllm.plan.schedule import Schedule

# The server's configuration, what requests set for themselves, and how often.
CONFIG = {"preset": "conservative", "reuse": "deep", "schedules": {"fast": "aggressive"}}
SETTINGS = [
    ({}, 0.6),
    ({"lazyllm": "off"}, 0.1),
    ({"lazyllm": "fast"}, 0.15),
    ({"lazyllm_reuse": "exact", "lazyllm_revive": "off"}, 0.15),
]


@dataclass(frozen=True)
class Scale:
    """What is different on a GPU and in a trial on a CPU.

    Attributes:
        model: a shape's name; minutes: of load; others: as in ``Pace``.
        flags: of the server.
    """

    model: str
    sizes: Sizes
    minutes: float
    rate: float
    most: int
    giants: float
    config: dict
    flags: Sequence[str] = ()


# The rate is about two thirds of what one H100 can do.
LARGE_SCALE = Scale("Llama-3.1-8B", LARGE, 25, 5.5, 128, 60, CONFIG)
# So few blocks that all are soon used: until then a CPU's memory grows with each one's first use.
SMALL_SCALE = Scale(
    model="small",
    sizes=SMALL,
    minutes=1.5,
    rate=0.8,
    most=8,
    giants=30,
    config=CONFIG | tiny.CONFIG,
    # Few blocks: all are in use soon, and what memory they take is seen.
    flags=(*tiny.FLAGS, "--num-gpu-blocks-override", "1500"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--minutes", type=float, help="of load; 25")
    parser.add_argument("--model", help="a checkpoint's folder or a shape's name; Llama-3.1-8B")
    parser.add_argument("--lazyllm-config", help=f"of the server; {json.dumps(CONFIG)}")
    parser.add_argument("--rate", type=float, help="jobs that arrive a second; 5.5")
    parser.add_argument("--most", type=int, help="jobs at a time; 128")
    parser.add_argument("--aborts", type=float, default=0.05, help="share of clients that leave")
    parser.add_argument("--server-flags", default="", help="others of vllm serve, as one text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=plot.FILE.parent, help="folder for results")
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    """Raises SystemExit: 0 if all was good."""
    use_cpu_settings()
    scale = SMALL_SCALE if args.small else LARGE_SCALE
    chosen = {
        name: getattr(args, name) or getattr(scale, name)
        for name in ("model", "minutes", "rate", "most")
    }
    text = args.lazyllm_config or json.dumps(scale.config)
    flags = ["--lazyllm-config", text, *scale.flags]
    flags += ["--max-model-len", str(scale.sizes.longest), *shlex.split(args.server_flags)]
    args.out.mkdir(parents=True, exist_ok=True)
    arguments = chosen | {"seed": args.seed, "aborts": args.aborts, "flags": shlex.join(flags)}
    report = Report(args.out / plot.FILE.name, arguments, args.commit)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # until the load has its own
    shapes = SHAPES | {SMALL_SCALE.model: tiny.SHAPE}
    model = shapes.get(chosen["model"]) or Path(chosen["model"])
    others = ["--enable-prompt-tokens-details"]
    try:
        with serving(model, flags + others, args.out / "server.log") as server:
            schedule, vocabulary = _schedule(text, server.shape), server.shape["vocab_size"]
            jobs = Jobs(args.seed, scale.sizes, _allowed(schedule), vocabulary, args.aborts)
            pace = Pace(chosen["minutes"] * 60, chosen["rate"], chosen["most"], scale.giants)
            is_good = asyncio.run(Load(server, jobs, pace, schedule).run(report))
    except ServerError as error:
        raise SystemExit(str(error)) from None
    raise SystemExit(0 if is_good else 1)


def _schedule(config: str, shape: dict) -> Schedule:
    """The server's, of a model with this config.json."""
    layers = shape["num_hidden_layers"]
    place = layers, full_layers(shape), parked_pages(shape)
    return Schedule.build(parse_config(config), *place)


def _allowed(schedule: Schedule) -> list[tuple[dict, float]]:
    """Of ``SETTINGS`` those that the server has, as often beside each other as there."""
    allowed = []
    for setting, weight in SETTINGS:
        try:
            schedule.setting(setting)
        except SettingError:
            continue
        allowed.append((setting, weight))
    total = sum(weight for _, weight in allowed)
    return [(setting, weight / total) for setting, weight in allowed]
