"""One streamed request, with its times."""

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from time import perf_counter

import aiohttp

NAME = "served"  # what requests call the model
_LONGEST_LINE = 2**23  # bytes of one event: the first has the prompt's tokens
_SILENCE = 300.0  # seconds without a byte after which a request has failed


class WrongAnswer(RuntimeError):
    """An answer that is not what was asked for."""


@dataclass(frozen=True)
class Answer:
    """Attributes:
    tokens: what was said.
    ttft: seconds to the first of them; gaps: between one event of the stream and the next.
    """

    tokens: list[int]
    ttft: float
    gaps: list[float]


def open_session() -> aiohttp.ClientSession:
    """For any number of requests at once. To be closed."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_read=_SILENCE),
        # A connection for each request: vLLM's server closes one that was idle for five seconds,
        # and a request sent at that moment would fail.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        read_bufsize=_LONGEST_LINE,
    )


async def stream(
    session: aiohttp.ClientSession, address: str, prompt: list[int], max_tokens: int, **fields
) -> AsyncGenerator[list[int], None]:
    """The tokens of an answer, event by event. To be closed if it is left before its end.

    Args:
        fields: others of the request.

    Raises:
        WrongAnswer: at the end too, if it was not all that was asked for.
        aiohttp.ClientError, OSError, TimeoutError, ValueError: the connection's, or no JSON.
    """
    body = fields | {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    said, reason, usage, is_done = 0, None, {}, False
    async with session.post(f"{address}/v1/completions", json=body) as response:
        if response.status != 200:
            raise WrongAnswer(f"status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            event = line.removeprefix(b"data:").strip()
            is_done = is_done or event == b"[DONE]"
            if is_done or not event:
                continue
            read = json.loads(event)
            if "error" in read:
                raise WrongAnswer(f"in the stream: {read['error']}")
            usage = read.get("usage") or usage
            for choice in read["choices"]:
                reason = choice["finish_reason"] or reason
                if new := choice["token_ids"]:
                    said += len(new)
                    yield new
    counts = said, usage.get("completion_tokens"), usage.get("prompt_tokens")
    if (*counts, reason, is_done) != (max_tokens, max_tokens, len(prompt), "length", True):
        raise WrongAnswer(f"{said} tokens, not {max_tokens}: {reason}, {usage}, {is_done}")


async def ask(
    session: aiohttp.ClientSession, address: str, prompt: list[int], max_tokens: int
) -> Answer:
    """The whole answer to a prompt. Raises what ``stream`` does."""
    tokens: list[int] = []
    times = [perf_counter()]
    async for new in stream(session, address, prompt, max_tokens):
        times.append(perf_counter())
        tokens += new
    gaps = [after - before for before, after in zip(times[1:], times[2:])]
    return Answer(tokens, times[1] - times[0], gaps)
