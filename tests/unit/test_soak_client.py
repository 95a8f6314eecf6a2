"""What the soak's client makes of what a server says, good and bad."""

import asyncio
import json
from dataclasses import replace

import pytest
from aiohttp import web

from benchmarks.soak.client import FAILED, FINISHED, LEFT, Client, Ledger, Sent
from benchmarks.soak.jobs import Ask
from benchmarks.soak.latency import Latencies


def event(**fields) -> str:
    return f"data: {json.dumps(fields)}\n\n"


def token(*tokens: int, reason: str | None = None) -> str:
    return event(choices=[{"token_ids": list(tokens), "finish_reason": reason}])


def usage(prompt: int, completion: int) -> str:
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


DONE = "data: [DONE]\n\n"
GOOD = [token(5), token(6, 7, reason="length"), usage(4, 3), DONE]
ASK = Ask("cold", [1, 2, 3, 4], 3, {})


def answer(
    ask: Ask, events: list[str], status: int = 200, silent: bool = False, times: int = 1
) -> Ledger:
    """What the client makes of what a server says to a request, sent so many times. A connection
    that was used before is closed when the next request comes over it, as one that was idle for
    too long may be."""
    used = []

    async def respond(request):
        if request.transport in used:
            request.transport.abort()
        used.append(request.transport)
        body = await request.json()
        assert (body["prompt"], body["max_tokens"]) == (ask.prompt, ask.max_tokens)
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for each in events:
            await response.write(each.encode())
        if silent:
            await asyncio.sleep(60)
        return response

    async def run() -> Ledger:
        app = web.Application()
        app.router.add_post("/v1/completions", respond)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]

        def job():
            for _ in range(times):
                yield ask

        try:
            async with Client(f"http://127.0.0.1:{port}") as client:
                client.ledger = Ledger(Latencies(60.0))
                await asyncio.wait_for(client.play(job()), 20)
                return client.ledger
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def timed(ledger: Ledger) -> list[dict]:
    """Summaries of its times to the first token and between tokens, of which there are some."""
    bins = ledger.latencies.by_bin()
    return [each[what] for what in ("ttft", "itl") for each in bins if each[what]]


def test_a_whole_answer():
    ledger = answer(ASK, GOOD)
    assert ledger.sent == [Sent(4, 3, (), FINISHED, 3)] and not ledger.errors
    assert [times["count"] for times in timed(ledger)] == [1, 2]


def test_no_request_goes_over_a_connection_that_is_closed():
    ledger = answer(ASK, GOOD, times=3)
    assert ledger.sent == [Sent(4, 3, (), FINISHED, 3)] * 3, ledger.errors


@pytest.mark.parametrize(
    "events, status",
    [
        ([token(5), token(6, reason="length"), usage(4, 2), DONE], 200),  # a token is missing
        ([token(5), token(6, 7, reason="stop"), usage(4, 3), DONE], 200),
        (GOOD[:-1], 200),  # the stream breaks off
        ([token(5), token(6, 7, reason="length"), usage(5, 3), DONE], 200),
        ([token(5), event(error={"message": "no"}), DONE], 200),
        (["data: {half\n\n"], 200),
        (["no"], 500),
    ],
)
def test_what_is_no_answer_is_an_error(events, status):
    ledger = answer(ASK, events, status)
    assert ledger.ended == {FAILED: 1} and sum(ledger.errors.values()) == 1


def test_a_client_that_leaves():
    left = answer(replace(ASK, leaves_after=1), GOOD[:1], silent=True)
    assert left.sent == [Sent(4, 3, (), LEFT, 1)] and not left.errors
    left = answer(replace(ASK, leaves_within=0.2), [], silent=True)
    assert left.sent == [Sent(4, 3, (), LEFT, 0)] and not left.errors
