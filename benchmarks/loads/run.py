"""``python -m benchmarks loads``: stock vLLM and LazyLLM under the same loads, one server after the
other; needs a GPU, or ``--small``."""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from benchmarks import results
from benchmarks.cpu import use_cpu_settings
from benchmarks.loads.cases import LARGE, SMALL
from benchmarks.loads.results import FILE, Row
from benchmarks.serving import tiny
from benchmarks.serving.metrics import reuses
from benchmarks.serving.server import serving
from benchmarks.speed.cases import name_of
from benchmarks.speed.shapes import DEEP, MEASURED, SHAPES, Pruning

ENGINES: dict[str, Pruning | None] = {"stock": None, "exact": MEASURED, "deep": DEEP}
_WARM = 4.0  # seconds at a load's highest rate, before it counts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--small", action="store_true", help="a tiny model, on a CPU")
    parser.add_argument("--shape", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--loads", nargs="+", choices=LARGE, default=list(LARGE))
    parser.add_argument(
        "--rates", nargs="+", type=float, help="what arrives a second; three of each load's own"
    )
    parser.add_argument("--seconds", type=float, default=60, help="of arrivals, at each rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=FILE, help="the results file; others' rows stay"
    )
    parser.add_argument("--commit", help="what is measured, where git cannot tell")


def main(args: argparse.Namespace) -> None:
    use_cpu_settings()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    console = Console(width=180)
    rows = results.read(args.out, Row)
    for name in args.engines:
        shape = tiny.SHAPE if args.small else SHAPES[args.shape]
        with serving(shape, _flags(name, args.small)) as server:
            console.print(f"{name} serves")
            for row in _measure(args, name, server.address):
                row.environment = results.environment(_versions(), args.commit)
                console.print(_line(row))
                rows[:] = [old for old in rows if old.key != row.key] + [row]
                results.write(args.out, rows)


def _flags(engine: str, is_small: bool) -> list[str]:
    flags, pruning = list(tiny.FLAGS) if is_small else [], ENGINES[engine]
    if pruning is not None:
        config = pruning.config | (tiny.CONFIG if is_small else {})
        flags += ["--lazyllm-config", json.dumps(config)]
    return flags


def _measure(args: argparse.Namespace, engine: str, address: str) -> Iterator[Row]:
    """Rows of a running server."""
    for which in args.loads:
        load = (SMALL if args.small else LARGE)[which]
        rates, at = args.rates or load.rates, list(LARGE).index(which)
        asyncio.run(load.play(address, max(rates), _WARM, (args.seed, at)))
        for rate in rates:
            seed, before = (args.seed, at, round(1000 * rate)), reuses(address)
            times = asyncio.run(load.play(address, rate, args.seconds, seed))
            yield Row.of(
                times,
                load=load.name,
                shape="tiny" if args.small else args.shape,
                engine=name_of(ENGINES[engine]),
                rate=rate,
                seconds=args.seconds,
                reuses=reuses(address) - before,
            )


def _versions() -> dict[str, str]:
    """Without a touch of the GPU, which is the server's."""
    import torch
    import triton

    import vllm
    from vllm.platforms import current_platform

    return {
        "gpu": current_platform.get_device_name() if current_platform.is_cuda() else "no GPU",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def _line(row: Row) -> str:
    return (
        f"{row.load:25} {row.engine:18} {row.rate:5g}/s {row.requests:5} requests, {row.reuses:5} "
        f"went on, first token {row.ttft:8.1f} ms, P99 {row.ttft_p99:8.1f}, "
        f"gap P99 {row.gap_p99:7.1f}, {row.speed:8.1f} tokens/s"
    )
