"""The benchmarks: which engines, measured how, beside stock vLLM in the same run.

Most times are taken on engines that stand side by side on the GPU and take turns, so that a clock
that drifts favours nobody. Many requests, and what depends on the size of the KV cache, have the
whole GPU, one engine after the other.
"""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.speed.engine import Engine
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import HALVES, SHAPES, TENTH, TWENTIETH, WHOLE, Pruning, flop_bound

GIB = 1 << 30
LLAMA_8B, LLAMA_7B = "Llama-3.1-8B", "Llama-2-7B"


@dataclass(frozen=True)
class Timed:
    """A prompt length (and batch, and steps) on the engines that ``pruning`` names, and stock.

    Each engine's turn is one run that does not count, if ``warm``, and ``runs`` that do; there are
    ``turns`` turns that count, after one of each engine that does not.
    """

    tokens: int
    turns: int
    engines: tuple[Pruning, ...]
    batch: int = 1
    steps: int = 0
    runs: int = 1
    warm: bool = False


@dataclass(frozen=True)
class Group:
    """Engines of one shape that stand side by side, and what is measured on them."""

    shape: str
    engines: tuple[Pruning, ...]
    kv_gib: int
    max_len: int
    ttft: tuple[Timed, ...]
    decode: tuple[Timed, ...] = ()


SHORT = 384  # under min_prompt_tokens: not pruned
_OFTEN = {"turns": 4, "runs": 3, "warm": True}

SIDE_BY_SIDE = (
    Group(
        LLAMA_8B,
        (HALVES, WHOLE),
        kv_gib=3,
        max_len=17408,
        ttft=(
            Timed(SHORT, engines=(HALVES,), **_OFTEN),
            Timed(4096, engines=(HALVES, WHOLE), **_OFTEN),
            Timed(16384, engines=(HALVES, WHOLE), **_OFTEN),
        ),
        decode=(
            Timed(SHORT, 5, (HALVES,), steps=64),
            Timed(8192, 5, (HALVES, WHOLE), steps=20),
        ),
    ),
    Group(
        LLAMA_7B,
        (TENTH, TWENTIETH),
        kv_gib=10,
        max_len=16640,
        ttft=(
            Timed(4000, engines=(TENTH, TWENTIETH), **_OFTEN),
            Timed(16384, engines=(TENTH, TWENTIETH), **_OFTEN),
        ),
    ),
    Group(
        LLAMA_8B,
        (HALVES,),
        kv_gib=18,
        max_len=131072,
        ttft=(
            Timed(32768, 4, (HALVES,)),
            Timed(65536, 2, (HALVES,)),
            Timed(131000, 2, (HALVES,)),
        ),
        decode=(Timed(130000, 2, (HALVES,), steps=20),),
    ),
)

# Benchmark, function of ``measure``, its arguments, runs of which the first does not count, unit.
ALONE = (
    ("decode", "decode", {"tokens": 8192, "batch": 16, "steps": 20}, 3, "ms"),
    ("decode", "decode", {"tokens": 8192, "batch": 64, "steps": 20}, 2, "ms"),
    ("memory", "room", {"tokens": 32768}, 1, "requests"),
    ("throughput", "throughput", {"requests": 64, "tokens": 16384, "max_tokens": 128}, 1,
     "tokens/s"),
)  # fmt: skip


def name_of(pruning: Pruning | None) -> str:
    return pruning.name if pruning else "stock"


@contextmanager
def _running(
    specs: list[tuple[str, Pruning | None, dict]], logs: Path
) -> Iterator[tuple[list[Engine], dict]]:
    """Engines started together, up when this yields them; versions."""
    engines = [
        Engine(SHAPES[shape], pruning, options, logs / f"{shape}-{i}.log")
        for i, (shape, pruning, options) in enumerate(specs)
    ]
    try:
        versions = [engine.ready() for engine in engines]
        yield engines, versions[0]
    finally:
        for engine in engines:
            engine.close()


def side_by_side(group: Group, wanted: set[str], report: Callable) -> None:
    """``ttft`` and ``decode`` of a group."""
    specs = []
    for pruning in (None, *group.engines):
        options = {
            "max_model_len": group.max_len, "max_num_batched_tokens": group.max_len,
            "max_num_seqs": 32, "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 128, 256, 384, 512],
            "kv_cache_memory_bytes": group.kv_gib * GIB, "gpu_memory_utilization": 0.1,
        }  # fmt: skip
        specs.append((group.shape, pruning, options))
    with tempfile.TemporaryDirectory() as logs, _running(specs, Path(logs)) as (engines, versions):
        told = _with(versions, report)
        if "ttft" in wanted:
            for timed in group.ttft:
                arguments = {"tokens": timed.tokens}
                _in_turn("ttft", group, engines, timed, arguments, told)
        if "decode" in wanted:
            for timed in group.decode:
                arguments = {"tokens": timed.tokens, "batch": timed.batch, "steps": timed.steps}
                _in_turn("decode", group, engines, timed, arguments, told)


def _in_turn(benchmark, group, engines, timed, arguments, report) -> None:
    chosen = [e for e in engines if e.pruning is None or e.pruning in timed.engines]
    results: dict[str, list[dict]] = {name_of(e.pruning): [] for e in chosen}
    for turn in range(-1, timed.turns):
        for engine in chosen:
            if timed.warm:
                engine.measure(benchmark, **arguments)
            for _ in range(timed.runs):
                result = engine.measure(benchmark, **arguments)
                if turn >= 0:
                    results[name_of(engine.pruning)].append(result)
    rows = []
    for engine in chosen:
        row = Row.of(
            results[name_of(engine.pruning)], benchmark=benchmark, shape=group.shape,
            engine=name_of(engine.pruning), tokens=timed.tokens, batch=timed.batch, unit="ms",
        )  # fmt: skip
        row.ratio = (rows[0] if rows else row).median / row.median
        if benchmark == "ttft" and engine.pruning and timed.tokens != SHORT:
            row.flop_bound = flop_bound(SHAPES[group.shape], engine.pruning.prune, timed.tokens)
        rows.append(row)
        report(row)


def whole_gpu(wanted: set[str], report: Callable) -> None:
    """``ALONE``'s benchmarks; and the ``profile`` of either engine, told as text."""
    rows: list[Row] = []
    profiles = []
    for pruning in (None, HALVES):
        # The tokens a step may have are each engine's own choice: stock vLLM cuts prompts up.
        options = {
            "max_model_len": 33280, "max_num_seqs": 128,
            "cudagraph_capture_sizes": [1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128],
        }  # fmt: skip
        specs = [(LLAMA_8B, pruning, options)]
        with tempfile.TemporaryDirectory() as logs, _running(specs, Path(logs)) as (up, versions):
            for benchmark, function, arguments, runs, unit in ALONE:
                if benchmark not in wanted:
                    continue
                results = [up[0].measure(function, **arguments) for _ in range(runs)]
                row = Row.of(
                    results[1:] or results, benchmark=benchmark, shape=LLAMA_8B,
                    engine=name_of(pruning), tokens=arguments["tokens"],
                    batch=arguments.get("batch", arguments.get("requests", 1)), unit=unit,
                )  # fmt: skip
                stock = next((r for r in rows if _same(r, row)), row)
                row.ratio = row.median / stock.median
                if unit == "ms":
                    row.ratio = 1 / row.ratio
                rows.append(row)
                _with(versions, report)(row)
            if "profile" in wanted:
                text = up[0].measure("profile", tokens=32768, decode_tokens=8192)["text"]
                profiles.append(f"{LLAMA_8B}, {name_of(pruning)}\n\n{text}")
                head = ", ".join(f"{name} {value}" for name, value in versions.items())
                report(f"{head}\n\n" + "\n".join(profiles))


def _same(a: Row, b: Row) -> bool:
    return (a.benchmark, a.tokens, a.batch) == (b.benchmark, b.tokens, b.batch)


def _with(versions: dict, report: Callable) -> Callable:
    """A ``report`` that adds what the row was measured with."""

    def told(row: Row) -> None:
        row.environment = versions
        report(row)

    return told
