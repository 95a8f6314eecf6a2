"""What prefix caching and chunked prefill are for, with `vllm serve`'s budget of tokens a step: the
next turn of a conversation, another question about one document, long prompts among decodes."""

from pathlib import Path

from benchmarks.speed.cases import Case, Plan
from benchmarks.speed.shapes import DEEP, MEASURED

FILE = Path(__file__).parent / "results" / "shared.jsonl"
# In the second of the questions the document was sent alone first.
TURN, LONG_TURN = "second turn", "long second turn"
QUESTION, ABOUT = "second question", "question about a document"
AT_ONCE = "questions at once"
ARRIVAL, EXTENSION = "arrival", "extension among decodes"
THROUGHPUT, SHARED_PREFIX = "throughput", "shared prefix"
_EXACT = (MEASURED,)  # where nobody goes on from anybody


def _turn(tokens: int, runs: int, name: str = TURN, more: int = 256) -> Case:
    return Case(name, "second_turn", {"tokens": tokens, "answer": 64, "more": more}, runs)


def _question(name: str, function: str) -> Case:
    return Case(name, function, {"tokens": 32768, "more": 128}, 3)


def _at_once(batch: int) -> Case:
    arguments = {"tokens": 32768, "more": 128, "batch": batch}
    return Case(AT_ONCE, "questions_at_once", arguments, 3)


def _arrival(tokens: int, runs: int, warm: int = 0) -> Case:
    arguments = {"tokens": tokens, "batch": 16}
    return Case(ARRIVAL, "arrival", arguments, runs, warm=warm, engines=_EXACT)


def _throughput(name: str, engines: tuple, **shared) -> Case:
    arguments = {"requests": 64, "tokens": 8192, "max_tokens": 128} | shared
    return Case(name, "throughput", arguments, 1, "tokens/s", 0, engines)


_AGENT = {"tokens": 16384, "answer": 64, "more": 200, "batch": 32, "decoded": 8192}

PLAN = Plan(
    "Llama-3.1-8B",
    (MEASURED, DEEP),
    max_len=131072,
    cases=(
        _turn(512, 7),  # too short to be pruned
        _turn(768, 7),  # the second turn is not
        _turn(16384, 3),
        _turn(65536, 2),
        _turn(16384, 3, LONG_TURN, 4096),  # of whose own tokens some are dropped
        _turn(65536, 2, LONG_TURN, 8192),
        _question(QUESTION, "second_question"),
        _question(ABOUT, "question_about_document"),
        *map(_at_once, (2, 4, 8)),
        Case(EXTENSION, "extension", _AGENT, 2),
        _arrival(32768, 2, warm=1),
        _arrival(65536, 1),
        _arrival(131056, 1),  # of 16s, like the others: no kernel is compiled in between
        _throughput(THROUGHPUT, _EXACT),
        _throughput(SHARED_PREFIX, (MEASURED, DEEP), shared=6144),
    ),
    functions="benchmarks.speed.measure_shared",
)
BENCHMARKS = tuple(dict.fromkeys(case.benchmark for case in PLAN.cases))
