"""What prefix caching and chunked prefill are for, with `vllm serve`'s budget of tokens a step: the
next turn of a conversation, another question about one document, long prompts among decodes."""

from pathlib import Path

from benchmarks.speed.cases import Case, Plan
from benchmarks.speed.shapes import MEASURED

FILE = Path(__file__).parent / "results" / "shared.jsonl"
TURN, QUESTION, ARRIVAL = "second turn", "second question", "arrival"
THROUGHPUT, SHARED_PREFIX = "throughput", "shared prefix"


def _arrival(tokens: int, runs: int, warm: int = 0) -> Case:
    return Case(ARRIVAL, "arrival", {"tokens": tokens, "batch": 16}, runs, warm=warm)


def _throughput(name: str, runs: int, **shared) -> Case:
    arguments = {"requests": 64, "tokens": 8192, "max_tokens": 128} | shared
    return Case(name, "throughput", arguments, runs, "tokens/s", 0)


PLAN = Plan(
    "Llama-3.1-8B",
    (MEASURED,),
    max_len=131072,
    cases=(
        Case(TURN, "second_turn", {"tokens": 16384, "answer": 64, "more": 256}, 3),
        Case(QUESTION, "second_question", {"tokens": 32768, "more": 128}, 3),
        _arrival(32768, 2, warm=1),
        _arrival(65536, 1),
        _arrival(131056, 1),  # of 16s, like the others: no kernel is compiled in between
        _throughput(THROUGHPUT, 1),
        _throughput(SHARED_PREFIX, 1, shared=6144),
    ),
    functions="benchmarks.speed.measure_shared",
)
BENCHMARKS = tuple(dict.fromkeys(case.benchmark for case in PLAN.cases))
