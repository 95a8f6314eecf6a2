"""One streamed request with its times."""

import json
from dataclasses import dataclass
from time import perf_counter

import aiohttp

NAME = "served"  # what requests call the model
_LONGEST_LINE = 2**23  # bytes of one event: the first has the prompt's tokens
_SILENCE = 300.0  # seconds without a byte after which a request has failed


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
        connector=aiohttp.TCPConnector(limit=0),
        read_bufsize=_LONGEST_LINE,
    )


async def ask(
    session: aiohttp.ClientSession, address: str, prompt: list[int], max_tokens: int
) -> Answer:
    """``max_tokens`` tokens after a prompt. Raises RuntimeError if it got others than that many,
    and what aiohttp raises."""
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    tokens: list[int] = []
    times = [perf_counter()]
    async with session.post(f"{address}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            event = line.removeprefix(b"data:").strip()
            if not event or event == b"[DONE]":
                continue
            read = json.loads(event)
            if "error" in read:
                raise RuntimeError(f"in the stream: {read['error']}")
            for choice in read["choices"]:
                if new := choice["token_ids"]:
                    times.append(perf_counter())
                    tokens += new
    if len(tokens) != max_tokens:
        raise RuntimeError(f"{len(tokens)} tokens, not {max_tokens}")
    gaps = [after - before for before, after in zip(times[1:], times[2:])]
    return Answer(tokens, times[1] - times[0], gaps)
