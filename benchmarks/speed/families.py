"""The model families, each measured in short: stock vLLM, then LazyLLM's default preset."""

from pathlib import Path

from benchmarks.speed.cases import Case, Plan, decode, ttft
from benchmarks.speed.shapes import MEASURED

FILE = Path(__file__).parent / "results" / "families.jsonl"
SHORT, LONG, DECODED = 4096, 32768, 8192  # tokens

_CASES = (
    ttft(SHORT, 5),
    ttft(LONG, 2),
    decode(DECODED, 1, 2),
    Case("memory", "room", {"tokens": LONG}, 1, "requests", 0),
)
# One request at a time: few CUDA graphs, since each takes time to capture.
_SIZES = {"cudagraph_capture_sizes": [1, 2, 4, 8, 512]}
_FP8_WEIGHTS, _FP8_KV = {"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}


def _plan(shape: str, name: str = "", **options) -> Plan:
    return Plan(shape, (MEASURED,), 33280, _CASES, name or shape, _SIZES | options)


_ALL = (
    _plan("Qwen3-8B"),
    _plan("Mistral-7B"),
    _plan("Qwen3-30B-A3B"),
    _plan("gpt-oss-20b"),
    _plan("Gemma-3-4B"),
    _plan("Llama-3.1-8B", "Llama-3.1-8B-FP8", **_FP8_WEIGHTS),
    _plan("Llama-3.1-8B", "Llama-3.1-8B-FP8-KV", **_FP8_KV),
    _plan("Llama-3.1-8B", "Llama-3.1-8B-FP8-both", **_FP8_WEIGHTS, **_FP8_KV),
)
PLANS = {plan.name: plan for plan in _ALL}
