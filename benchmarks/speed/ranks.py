"""Tensor parallelism: a model on several GPUs of one host, stock vLLM with as many beside it."""

from pathlib import Path

from benchmarks.speed.cases import Case, Plan, decode, ttft
from benchmarks.speed.shapes import BALANCED, CONSERVATIVE

FILE = Path(__file__).parent / "results" / "ranks.jsonl"
LENGTHS = (4096, 8192, 32768, 131000)  # tokens; the last where the context is that long
DECODED, ROOM = 8192, 32768
COLLECTIVES = "collectives"

_CASES = (
    *(ttft(n, 3) for n in LENGTHS[:2]),
    ttft(LENGTHS[2], 2),
    ttft(LENGTHS[3], 1),
    decode(DECODED, 1, 2),
    decode(DECODED, 16, 1),
    Case("memory", "room", {"tokens": ROOM}, 1, "requests", 0),
    Case(COLLECTIVES, "collectives", {"tokens": ROOM, "decode_tokens": DECODED}, 1),
)
# Few CUDA graphs, since each takes time to capture.
_SIZES = {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 512]}


def _plan(shape: str, ranks: int, max_len: int = 131072) -> Plan:
    cases = tuple(c for c in _CASES if c.arguments["tokens"] < max_len)
    options = _SIZES | {"tensor_parallel_size": ranks}
    name, functions = f"{shape}, {ranks} GPUs", "benchmarks.speed.measure_ranks"
    return Plan(shape, (CONSERVATIVE, BALANCED), max_len, cases, name, options, functions)


_ALL = (
    _plan("Llama-3.1-8B", 2),
    _plan("Qwen3-30B-A3B", 2, max_len=40960),
    _plan("Llama-3.1-70B", 2),
    _plan("Llama-3.1-70B", 4),
    _plan("Llama-3.1-70B", 8),
    _plan("Qwen3-235B-A22B-FP8", 4, max_len=40960),
    _plan("Qwen3-235B-A22B-FP8", 8, max_len=40960),
)
PLANS = {plan.name: plan for plan in _ALL}
