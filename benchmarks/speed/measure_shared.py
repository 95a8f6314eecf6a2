"""What is measured on a running engine of prefix caching and chunked prefill; see ``measure``."""

import itertools
import statistics
import time
from typing import NamedTuple

from vllm import LLM

from benchmarks.speed.measure import (
    check_cold,
    core,
    end_all,
    new_ids,
    new_prompts,
    params,
    throughput,
)

__all__ = [
    "arrival",
    "extension",
    "question_about_document",
    "questions_at_once",
    "second_question",
    "second_turn",
    "throughput",
]

_NAMES = itertools.count()
# Of the requests that decode while a prompt arrives: tokens that each has before, and at most.
_STEADY, _MOST = 40, 1000


class _Answer(NamedTuple):
    """A request's name, milliseconds to the first token, all tokens, prompt tokens found in the
    cache."""

    name: str
    ttft: float
    tokens: list[int]
    cached: int


def second_turn(llm: LLM, tokens: int, answer: int, more: int) -> dict:
    """Time to the first token of a conversation's second turn: a prompt of ``tokens`` tokens, its
    answer, ``more`` tokens. The first turn's is ``cold``."""
    (prompt,), (rest,) = new_ids(1, tokens), new_ids(1, more)
    first = _ask(llm, prompt, answer)
    return _again(llm, first, tokens, prompt + first.tokens, rest)


def second_question(llm: LLM, tokens: int, more: int) -> dict:
    """Time to the first token of another question, of ``more`` tokens, after the same document.
    The first question, which came with the document, is ``cold``."""
    (document,), (question, another) = new_ids(1, tokens), new_ids(2, more)
    first = _ask(llm, document + question, 1)
    return _again(llm, first, tokens + more, document, another, goes_on=False)


def question_about_document(llm: LLM, tokens: int, more: int) -> dict:
    """The same, where the document was sent alone first, which is ``cold``, and then a question."""
    (document,), (question, another) = new_ids(1, tokens), new_ids(2, more)
    first = _ask(llm, document, 1)
    _ask(llm, document + question, 1)
    return _again(llm, first, tokens, document, another)


def questions_at_once(llm: LLM, tokens: int, more: int, batch: int) -> dict:
    """Time to first token, the mean of ``batch`` questions of ``more`` tokens that come at once,
    about a document that was sent alone, and of which one question was asked before."""
    (document,), (question, *others) = new_ids(1, tokens), new_ids(1 + batch, more)
    _check_cold(_ask(llm, document, 1))
    _ask(llm, document + question, 1)
    answers = _ask_at_once(llm, [document + other for other in others], 1)
    for answer in answers:
        _reused(llm, answer, tokens, goes_on=True)
    times = [answer.ttft for answer in answers]
    return {"value": statistics.mean(times), "longest": max(times)}


def _again(
    llm: LLM,
    cold: _Answer,
    cold_tokens: int,
    shared: list[int],
    rest: list[int],
    goes_on: bool = True,
) -> dict:
    """Ask a prompt that begins with ``shared``, which the cold one had. Raises RuntimeError if the
    cold one found something in the cache; see ``_reused`` for this one."""
    warm = _ask(llm, shared + rest, 1)
    _check_cold(cold)
    return {
        "value": warm.ttft,
        "cold": cold.ttft,
        "cold_tokens": cold_tokens,
        "tokens": len(shared) + len(rest),
        "shared": len(shared),
        "cached": warm.cached,
        "reused": _reused(llm, warm, len(shared), goes_on),
    }


def _check_cold(answer: _Answer) -> None:
    """Raises RuntimeError if the cache had a part of the prompt."""
    if answer.cached:
        raise RuntimeError(f"{answer.cached} tokens of the first prompt were cached")


def _reused(llm: LLM, answer: _Answer, shared: int, goes_on: bool) -> int:
    """Tokens that a request had of the one from which it went on (``reuse: deep``), out of its
    statistics. One that is too short to be pruned shares all that was cached, and tells of none.

    Args:
        shared: tokens of the prompt before, and of its answer, whose last one never ran.
        goes_on: whether it does with ``reuse: deep``.

    Raises:
        RuntimeError: it went on and should not, or the other way round; or a whole block of
            ``shared`` was not cached.
    """
    cached = answer.cached
    if not shared - core(llm).vllm_config.cache_config.block_size <= cached <= shared:
        raise RuntimeError(
            f"{cached} tokens of the second prompt were cached, which shares {shared}"
        )
    found, may_go_on = _statistics(llm, answer.name)
    # From a prompt that was not pruned in whole blocks.
    least = min(shared - 1, cached) if goes_on and may_go_on else 0
    if not least <= found <= (shared if least else 0):
        raise RuntimeError(f"the second prompt went on from {found} tokens, and shares {shared}")
    return found


def _statistics(llm: LLM, name: str) -> tuple[int, bool]:
    """Reused tokens of a request; whether it may go on, by its length and ``reuse``."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config
    from lazyllm_vllm.plan.request_setting import DEEP

    config = lazyllm_config(core(llm).vllm_config)
    if config is None:
        return 0, False
    # vLLM lets its own random word follow the name.
    mine = [r for r in request_stats(llm)["requests"] if r["request_id"].startswith(f"{name}-")]
    is_long = mine[-1]["prompt_tokens"] >= config.min_prompt_tokens
    return mine[-1]["reused"], config.reuse == DEEP and is_long


def _ask(llm: LLM, prompt: list[int], max_tokens: int) -> _Answer:
    (answer,) = _ask_at_once(llm, [prompt], max_tokens)
    return answer


def _ask_at_once(llm: LLM, prompts: list[list[int]], max_tokens: int) -> list[_Answer]:
    engine, firsts, lasts = llm.llm_engine, {}, {}
    names = [f"ask-{next(_NAMES)}" for _ in prompts]
    start = time.monotonic()
    for name, prompt in zip(names, prompts):
        engine.add_request(name, {"prompt_token_ids": prompt}, params(max_tokens))
    while engine.has_unfinished_requests():
        for output in engine.step():
            firsts.setdefault(output.request_id, 1000 * (time.monotonic() - start))
            lasts[output.request_id] = output
    tokens = {name: list(last.outputs[0].token_ids) for name, last in lasts.items()}
    return [
        _Answer(name, firsts[name], tokens[name], lasts[name].num_cached_tokens or 0)
        for name in names
    ]


def arrival(llm: LLM, tokens: int, batch: int, decoded: int = 2048) -> dict:
    """The longest time between two tokens of any of ``batch`` requests that decode after
    ``decoded`` tokens, while a prompt of ``tokens`` tokens waits for its first token; that prompt's
    time to first token; the time between two tokens before it came, the median."""
    (prompt,) = new_ids(1, tokens)
    answer, times = _among_decodes(llm, prompt, batch, decoded)
    _check_cold(answer)
    return times


def extension(llm: LLM, tokens: int, answer: int, more: int, batch: int, decoded: int) -> dict:
    """The same while a conversation goes on: after a prompt of ``tokens`` tokens and its answer
    ``more`` tokens come."""
    (prompt,), (rest,) = new_ids(1, tokens), new_ids(1, more)
    first = _ask(llm, prompt, answer)
    _check_cold(first)
    shared = prompt + first.tokens
    second, times = _among_decodes(llm, shared + rest, batch, decoded)
    return times | {"cached": second.cached, "reused": _reused(llm, second, len(shared), True)}


def _among_decodes(
    llm: LLM, prompt: list[int], batch: int, decoded: int
) -> tuple[_Answer, dict[str, float]]:
    """A prompt that comes while ``batch`` requests decode, and the times that ``arrival`` tells."""
    engine = llm.llm_engine
    names = [f"decode-{next(_NAMES)}" for _ in range(batch)]
    for name, other in zip(names, new_prompts(batch, decoded)):
        engine.add_request(name, other, params(_MOST))
    newcomer = f"arrival-{next(_NAMES)}"
    count, last = dict.fromkeys(names, 0), {}
    before, during = [], []
    came = first = None
    while first is None or min(last.values()) < first:
        outputs, now = engine.step(), time.monotonic()
        for output in outputs:
            name = output.request_id
            if name == newcomer:
                first, answer = now, output
                continue
            check_cold([output])
            if output.finished:
                raise RuntimeError(f"a request decoded {_MOST} tokens before the prompt's first")
            if name in last:
                (before if came is None else during).append(now - last[name])
            count[name], last[name] = count[name] + 1, now
        if came is None and min(count.values()) >= _STEADY:
            came = time.monotonic()
            engine.add_request(newcomer, {"prompt_token_ids": prompt}, params(1))
    end_all(llm, names)
    ttft = 1000 * (first - came)
    times = {"value": 1000 * max(during), "ttft": ttft, "usual": 1000 * statistics.median(before)}
    said = list(answer.outputs[0].token_ids)
    return _Answer(newcomer, ttft, said, answer.num_cached_tokens or 0), times
