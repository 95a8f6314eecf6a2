"""What is measured on a running engine of prefix caching and chunked prefill; see ``measure``."""

import itertools
import statistics
import time
from typing import NamedTuple

from vllm import LLM

from benchmarks.speed.measure import check_cold, new_ids, new_prompts, params, throughput

__all__ = ["arrival", "second_question", "second_turn", "throughput"]

_NAMES = itertools.count()
# Of the requests that decode while a prompt arrives: tokens that each has before, and at most.
_STEADY, _MOST = 40, 1000


class _Answer(NamedTuple):
    """Milliseconds to the first token, all tokens, prompt tokens found in the cache."""

    ttft: float
    tokens: list[int]
    cached: int


def second_turn(llm: LLM, tokens: int, answer: int, more: int) -> dict:
    """Time to the first token of a conversation's second turn: a prompt of ``tokens`` tokens, its
    answer, ``more`` tokens. The first turn's is ``cold``."""
    (prompt,), (rest,) = new_ids(1, tokens), new_ids(1, more)
    first = _ask(llm, prompt, answer)
    return _compare(llm, first, tokens, prompt + first.tokens, rest)


def second_question(llm: LLM, tokens: int, more: int) -> dict:
    """Time to the first token of another question, of ``more`` tokens, after the same document.
    The first question's is ``cold``."""
    (document,), (question, another) = new_ids(1, tokens), new_ids(2, more)
    first = _ask(llm, document + question, 1)
    return _compare(llm, first, tokens + more, document, another)


def _compare(llm: LLM, cold: _Answer, cold_tokens: int, shared: list[int], rest: list[int]) -> dict:
    """Ask a prompt that begins with ``shared``, which the cold one had. Raises RuntimeError if the
    cold one found something in the cache, or this one nothing."""
    warm = _ask(llm, shared + rest, 1)
    if cold.cached or not warm.cached:
        raise RuntimeError(
            f"cached: {cold.cached} tokens of the first prompt, {warm.cached} of the second, which "
            f"shares {len(shared)}"
        )
    return {
        "value": warm.ttft,
        "cold": cold.ttft,
        "cold_tokens": cold_tokens,
        "tokens": len(shared) + len(rest),
        "shared": len(shared),
        "cached": warm.cached,
    }


def _ask(llm: LLM, prompt: list[int], max_tokens: int) -> _Answer:
    engine, first = llm.llm_engine, None
    start = time.monotonic()
    engine.add_request(f"ask-{next(_NAMES)}", {"prompt_token_ids": prompt}, params(max_tokens))
    while engine.has_unfinished_requests():
        for output in engine.step():
            if first is None:
                first = 1000 * (time.monotonic() - start)
    return _Answer(first, list(output.outputs[0].token_ids), output.num_cached_tokens or 0)


def arrival(llm: LLM, tokens: int, batch: int, decoded: int = 2048) -> dict:
    """The longest time between two tokens of any of ``batch`` requests that decode after
    ``decoded`` tokens, while a prompt of ``tokens`` tokens waits for its first token; that prompt's
    time to first token; the time between two tokens before it came, the median."""
    engine = llm.llm_engine
    names = [f"decode-{next(_NAMES)}" for _ in range(batch)]
    for name, prompt in zip(names, new_prompts(batch, decoded)):
        engine.add_request(name, prompt, params(_MOST))
    (prompt,), newcomer = new_prompts(1, tokens), f"arrival-{next(_NAMES)}"
    count, last = dict.fromkeys(names, 0), {}
    before, during = [], []
    came = first = None
    while first is None or min(last.values()) < first:
        outputs, now = engine.step(), time.monotonic()
        check_cold(outputs)
        for output in outputs:
            name = output.request_id
            if name == newcomer:
                first = now
                continue
            if output.finished:
                raise RuntimeError(f"a request decoded {_MOST} tokens before the prompt's first")
            if name in last:
                (before if came is None else during).append(now - last[name])
            count[name], last[name] = count[name] + 1, now
        if came is None and min(count.values()) >= _STEADY:
            came = time.monotonic()
            engine.add_request(newcomer, prompt, params(1))
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()
    return {
        "value": 1000 * max(during),
        "ttft": 1000 * (first - came),
        "usual": 1000 * statistics.median(before),
    }
