"""The benchmarks: which engines, measured how. Stock vLLM goes first, then LazyLLM, each alone on
the GPU, in one run of one command."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.speed.results import Row
from benchmarks.speed.shapes import (
    AGGRESSIVE,
    BALANCED,
    CONSERVATIVE,
    MEASURED,
    SHAPES,
    Pruning,
)
from benchmarks.speed.start import start
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.operations import extension_flops, flop_bound, flops
from lazyllm_vllm.plan.schedule import LONG_TURN_FROM

PRUNED_FROM = LazyLLMConfig().min_prompt_tokens
BUDGET = 8192  # tokens a step: the default of ``vllm serve``
# Among them, those of vLLM's default that batches of decodes and second prompts take.
_SIZES = [1, 2, 4, 8, 16, 24, 32, 64, 128, 144, 256, 272, 384, 512]


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        benchmark, function: what it is called, and which of the plan's functions it is.
        runs: how often it counts; ``warm`` runs before do not.
        engines: the prunings that it is measured on, besides stock vLLM; all of the plan's if none.
    """

    benchmark: str
    function: str
    arguments: dict
    runs: int
    unit: str = "ms"
    warm: int = 1
    engines: tuple[Pruning, ...] = ()

    @property
    def batch(self) -> int:
        """Requests at once, as rows have it."""
        return self.arguments.get("batch", self.arguments.get("requests", 1))


@dataclass(frozen=True)
class Plan:
    """A shape, the engines that serve it, one after the other, and what is measured on each.

    Attributes:
        name: what rows call it; the shape's name if empty.
        options: further arguments of ``LLM``, for all of its engines.
        functions: the module whose functions measure the cases.
    """

    shape: str
    engines: tuple[Pruning, ...]
    max_len: int
    cases: tuple[Case, ...]
    name: str = ""
    options: dict = field(default_factory=dict)
    functions: str = "benchmarks.speed.measure"


def ttft(tokens: int, runs: int, **fields) -> Case:
    return Case("ttft", "ttft", {"tokens": tokens}, runs, **fields)


def decode(tokens: int, batch: int, runs: int, steps: int = 20, **fields) -> Case:
    arguments = {"tokens": tokens, "batch": batch, "steps": steps}
    return Case("decode", "decode", arguments, runs, **fields)


_ONE = (MEASURED,)
# Tokens: prompts that are not pruned, and those that are.
_SHORT = (1, 64, 256, 512, 768, PRUNED_FROM - 1)
_PRUNED = (PRUNED_FROM, 1280, 1536, 2048, 3072, 4096)
_ALL = (
    Plan(
        "Llama-3.1-8B",
        (CONSERVATIVE, BALANCED, AGGRESSIVE),
        max_len=131072,
        cases=(
            *(ttft(n, 11) for n in _SHORT + _PRUNED),
            ttft(8192, 7),
            ttft(16384, 5),
            ttft(32768, 3),
            ttft(65536, 2, engines=_ONE),
            ttft(131000, 1, engines=_ONE),
            decode(384, 1, 3, steps=64, engines=_ONE),
            decode(8192, 1, 3, engines=_ONE),
            decode(8192, 16, 2, engines=_ONE),
            decode(8192, 32, 1, engines=_ONE),
            decode(130000, 1, 1, engines=_ONE),
            Case("memory", "room", {"tokens": 32768}, 1, "requests", 0),
            Case(
                "throughput",
                "throughput",
                {"requests": 64, "tokens": 16384, "max_tokens": 128},
                1,
                "tokens/s",
                0,
                _ONE,
            ),
            Case("profile", "profile", {"tokens": 32768, "decode_tokens": 8192}, 1, "", 0, _ONE),
        ),
    ),
    Plan(
        "Llama-2-7B",
        _ONE,
        max_len=16640,
        cases=(ttft(4000, 11), ttft(16384, 7)),
    ),
)
BENCHMARKS = tuple(dict.fromkeys(case.benchmark for plan in _ALL for case in plan.cases))


def plans(wanted: set[str], only: list[int] | None = None) -> list[Plan]:
    """What there is to run for some of ``BENCHMARKS``; ``only``: of these plans, from 0. Raises
    IndexError for a plan that there is not."""
    chosen = _ALL if only is None else [_ALL[i] for i in only]
    cut = (
        replace(plan, cases=tuple(case for case in plan.cases if case.benchmark in wanted))
        for plan in chosen
    )
    return [plan for plan in cut if plan.cases]


def name_of(pruning: Pruning | None) -> str:
    return pruning.name if pruning else "stock"


def run(plan: Plan, report: Callable[[Row], None], show: Callable[[str], None]) -> None:
    """Measure every engine of a plan.

    Args:
        report: given each row as soon as it is there.
        show: given what is text, not a figure: profiles.
    """
    stock: dict[tuple, Row] = {}
    for pruning in (None, *plan.engines):
        cases = [c for c in plan.cases if not c.engines or pruning in (None, *c.engines)]
        if not cases:
            continue
        with tempfile.TemporaryDirectory() as folder:
            arguments = {
                "shape": SHAPES[plan.shape],
                "config": pruning.config if pruning else None,
                "options": _options(plan),
            }
            has_workers = plan.options.get("tensor_parallel_size", 1) > 1
            engine = Engine(start, arguments, plan.functions, Path(folder, "log"), has_workers)
            try:
                versions = engine.ready()
                for case in cases:
                    results = [
                        engine.run(case.function, **case.arguments)
                        for _ in range(case.warm + case.runs)
                    ]
                    if case.function == "ttft" and pruning:
                        engine.run("check", tokens=case.arguments["tokens"])
                    if "text" in results[-1]:
                        show(f"{plan.shape}, {name_of(pruning)}\n\n{results[-1]['text']}")
                        continue
                    row = _row(plan, case, pruning, results[case.warm :])
                    row.environment = versions
                    _compare(row, stock.setdefault((row.benchmark, row.tokens, row.batch), row))
                    report(row)
            finally:
                engine.close()


def _options(plan: Plan) -> dict:
    return {
        "max_model_len": plan.max_len,
        "max_num_seqs": 128,
        "max_num_batched_tokens": BUDGET,
        "cudagraph_capture_sizes": _SIZES,
    } | plan.options


def _row(plan: Plan, case: Case, pruning: Pruning | None, results: list[dict]) -> Row:
    tokens = case.arguments["tokens"]
    row = Row.of(
        results,
        benchmark=case.benchmark,
        shape=plan.name or plan.shape,
        engine=name_of(pruning),
        tokens=tokens,
        batch=case.batch,
        unit=case.unit,
    )
    shape = SHAPES[plan.shape]
    cuts = pruning.cuts(shape) if pruning else ()
    if case.benchmark == "ttft" and pruning and tokens >= PRUNED_FROM:
        row.flop_bound = flop_bound(shape, cuts, tokens)
    if "cold" in row.details:
        row.details["bound"] = _warm_bound(shape, cuts, row.details)
    return row


def _warm_bound(shape: dict, cuts: tuple[tuple[int, float], ...], details: dict) -> float:
    """Milliseconds that a prompt's operations take at the speed of the cold prompt before it: its
    new tokens' in the first stage and all of the later ones', or, if it goes on from what was kept,
    its new tokens' in all, as one does that is too short to be pruned, or, of a long turn, those
    that it keeps."""
    tokens, shared = details["tokens"], details["shared"]
    of_cold = cuts if details["cold_tokens"] >= PRUNED_FROM else ()
    if details["reused"]:
        own = tokens - shared
        warm = extension_flops(shape, of_cold, shared, own, drops=own >= LONG_TURN_FROM)
    else:
        warm = flops(shape, cuts if tokens >= PRUNED_FROM else (), tokens, shared)
    return details["cold"] * warm / flops(shape, of_cold, details["cold_tokens"])


def _compare(row: Row, stock: Row) -> None:
    row.ratio = row.median / stock.median
    if row.unit == "ms":
        row.ratio = 1 / row.ratio
    if "ttft" in row.details:
        row.details["stock_ttft"] = stock.details["ttft"]
