"""Sends requests and remembers what came back."""

import asyncio
from collections import Counter
from contextlib import aclosing
from dataclasses import dataclass, field
from time import monotonic

import aiohttp

from benchmarks.serving.client import WrongAnswer, open_session, stream
from benchmarks.soak.jobs import Ask, Job
from benchmarks.soak.latency import Latencies

FINISHED, LEFT, FAILED = "finished", "left", "failed"
_MOST_ERRORS = 50  # shown one by one


@dataclass(frozen=True)
class Sent:
    """A request that is over.

    Attributes:
        end: one of ``FINISHED``, ``LEFT`` (its client went away) and ``FAILED``.
        said: tokens that its client saw.
    """

    num_prompt: int
    max_tokens: int
    setting: tuple[tuple[str, str], ...]
    end: str
    said: int


@dataclass
class Ledger:
    """Of all requests. ``began``: when latencies count from, by ``time.monotonic``."""

    latencies: Latencies
    began: float = 0.0
    sent: list[Sent] = field(default_factory=list)
    kinds: Counter = field(default_factory=Counter)
    errors: Counter = field(default_factory=Counter)

    def note(self, ask: Ask, end: str, said: int) -> None:
        setting = tuple(sorted(ask.setting.items()))
        self.sent.append(Sent(len(ask.prompt), ask.max_tokens, setting, end, said))
        self.kinds[ask.kind, end] += 1

    def fail(self, text: str) -> None:
        """Count an error, of many different ones together."""
        text = text if text in self.errors or len(self.errors) < _MOST_ERRORS else "others"
        self.errors[text] += 1

    @property
    def ended(self) -> Counter:
        """Requests by their end."""
        return Counter(one.end for one in self.sent)


class Client:
    """Plays jobs against a server. Nothing that goes wrong is raised: the ledger has it.

    Attributes:
        ledger: to be set before the first job.
        is_closing: no job goes on to its next request.
    """

    ledger: Ledger

    def __init__(self, address: str) -> None:
        self.address, self.is_closing = address, False
        self.session = open_session()

    async def __aenter__(self) -> "Client":
        return self

    async def __aexit__(self, *_) -> None:
        await self.session.close()

    async def play(self, job: Job) -> None:
        """All requests of a job, one after the other, unless one's answer does not come whole."""
        ask = next(job)
        while ask is not None:
            await asyncio.sleep(ask.wait)
            answer = await self._ask(ask)
            if answer is None or self.is_closing:
                return
            try:
                ask = job.send(answer)
            except StopIteration:
                return

    async def _ask(self, ask: Ask) -> list[int] | None:
        tokens: list[int] = []
        end = FAILED
        try:
            async with asyncio.timeout(ask.leaves_within) as clock:
                end = await self._stream(ask, tokens)
        except TimeoutError as error:  # of the clock, or aiohttp's
            end = LEFT if clock.expired() else FAILED
            if end is FAILED:
                self.ledger.fail(f"{ask.kind}: hangs: {error!r}")
        except (aiohttp.ClientError, WrongAnswer, ValueError, OSError) as error:
            self.ledger.fail(f"{ask.kind}: {error!r}"[:500])
        finally:  # also if the load is called off
            self.ledger.note(ask, end, len(tokens))
        return tokens if end is FINISHED else None

    async def _stream(self, ask: Ask, tokens: list[int]) -> str:
        """How it ends; raises what ``stream`` does."""
        others = {"vllm_xargs": ask.setting} if ask.setting else {}
        last = monotonic()
        events = stream(self.session, self.address, ask.prompt, ask.max_tokens, **others)
        async with aclosing(events):
            async for new in events:
                self._time(ask, monotonic() - last, len(new), is_first=not tokens)
                last = monotonic()
                tokens += new
                if ask.leaves_after is not None and len(tokens) >= ask.leaves_after:
                    return LEFT
        return FINISHED

    def _time(self, ask: Ask, seconds: float, num_tokens: int, is_first: bool) -> None:
        at = monotonic() - self.ledger.began
        if is_first:
            self.ledger.latencies.first_token(ask.kind, at, seconds)
        else:
            self.ledger.latencies.next_tokens(at, seconds, num_tokens)
