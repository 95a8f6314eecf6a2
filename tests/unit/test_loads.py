"""Servers under load: the client, what arrives, and the report, without ``vllm serve``."""

import argparse
import asyncio
import json
import sys
from contextlib import contextmanager

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from benchmarks import results
from benchmarks.loads import report, run
from benchmarks.loads.cases import LARGE, SMALL, Cold, Conversations, Questions
from benchmarks.loads.results import Row, Times
from benchmarks.serving import metrics, server
from benchmarks.serving.client import NAME, ask, open_session
from benchmarks.speed.shapes import DEEP, MEASURED


class Completions:
    """Stands for a server: after a prompt it says its length, then the next numbers.

    Attributes:
        asked: bodies of the requests, in the order in which they came.
        wait: seconds before each token.
    """

    def __init__(self, wait: float = 0.0) -> None:
        self.asked: list[dict] = []
        self.wait = wait

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.asked.append(body)
        if body["prompt"] == [0]:
            return web.Response(status=400, text="no prompt")
        stream = web.StreamResponse()
        await stream.prepare(request)
        says = body["max_tokens"] - (body["prompt"] == [1])
        for i in range(says):
            await asyncio.sleep(self.wait)
            choice = {"text": "", "token_ids": [len(body["prompt"]) + i]}
            choice["finish_reason"] = "length" if i + 1 == body["max_tokens"] else None
            await self._send(stream, {"choices": [choice]})
        if body["prompt"] == [2]:
            await self._send(stream, {"error": {"message": "lost"}})
        if "stream_options" in body:
            usage = {"completion_tokens": says, "prompt_tokens": len(body["prompt"])}
            await self._send(stream, {"choices": [], "usage": usage})
        await stream.write(b"data: [DONE]\n\n")
        return stream

    @staticmethod
    async def _send(stream: web.StreamResponse, event: dict) -> None:
        await stream.write(f"data: {json.dumps(event)}\n\n".encode())

    def run(self, play):
        """What ``play(address)`` returns."""

        async def played():
            app = web.Application()
            app.router.add_post("/v1/completions", self._answer)
            async with TestServer(app) as at:
                return await play(str(at.make_url("")).rstrip("/"))

        return asyncio.run(played())

    @property
    def prompts(self) -> list[list[int]]:
        return [body["prompt"] for body in self.asked]


def _ask(prompt: list[int], max_tokens: int):
    async def play(address: str):
        async with open_session() as session:
            return await ask(session, address, prompt, max_tokens)

    return play


def test_a_request_and_its_times():
    fake = Completions(wait=0.03)
    answer = fake.run(_ask([5, 6, 7], 4))
    assert answer.tokens == [3, 4, 5, 6]
    assert answer.ttft >= 0.03 and len(answer.gaps) == 3 and min(answer.gaps) > 0
    assert 0.12 <= answer.ttft + sum(answer.gaps) < 5
    (body,) = fake.asked
    assert (body["model"], body["ignore_eos"], body["temperature"]) == (NAME, True, 0)


@pytest.mark.parametrize(
    "prompt, why", [([0], "status 400: no prompt"), ([1], "3 tokens, not 4"), ([2], "lost")]
)
def test_a_request_that_fails(prompt, why):
    with pytest.raises(RuntimeError, match=why):
        Completions().run(_ask(prompt, 4))


def test_cold_prompts_are_those_of_the_seed():
    """Each is asked once, so that no cache has it, and two in a row are never near each other."""
    load = Cold((1,), tokens=20, max_tokens=3)
    asked = []
    for seed in ((0, 1), (0, 1), (0, 2)):
        fake = Completions()
        times = fake.run(lambda address: load.play(address, 50, 0.2, seed))
        assert len(times.ttfts) == 10 and len(times.gaps) == 20 and times.tokens == 30
        assert 0.1 < times.seconds < 10 and min(times.ttfts) > 0
        assert {(len(p), body["max_tokens"]) for p, body in zip(fake.prompts, fake.asked)} == {
            (20, 3)
        }
        asked.append(sorted(map(tuple, fake.prompts)))
    assert asked[0] == asked[1] and len(set(asked[0])) == 10
    assert not set(asked[0]) & set(asked[2])


def test_a_failed_prompt_makes_no_figure():
    load = Cold((1,), tokens=20, max_tokens=3)
    fake = Completions()

    async def refuse(request):
        return web.Response(status=500, reason="broken")

    fake._answer = refuse
    with pytest.raises(RuntimeError, match="2 requests failed.*broken"):
        fake.run(lambda address: load.play(address, 50, 0.04, (0,)))


def test_the_document_is_sent_alone_first():
    load = Questions((1,), document=30, question=4, max_tokens=2)
    fake = Completions()
    times = fake.run(lambda address: load.play(address, 50, 0.1, (0,)))
    document, *questions = fake.prompts
    assert len(document) == 30 and fake.asked[0]["max_tokens"] == 1
    assert len(questions) == len(times.ttfts) == 5  # the document's own is not counted
    assert all(q[:30] == document and len(q) == 34 for q in questions)
    assert len({tuple(q) for q in questions}) == 5


def test_conversations_go_on_from_their_answers():
    load = Conversations((1,), 6, (10, 12), (3, 3), (4, 5), (2, 3), thinking=0.01)
    fake = Completions()
    times = fake.run(lambda address: load.play(address, 40, 0.1, (0,)))
    common = fake.prompts[0][:6]
    assert all(prompt[:6] == common for prompt in fake.prompts)
    talks: list[list[dict]] = []
    for body in sorted(fake.asked, key=lambda body: len(body["prompt"])):
        prompt = body["prompt"]
        for talk in talks:
            before = len(talk[-1]["prompt"])
            said = list(range(before, before + talk[-1]["max_tokens"]))
            if prompt[: before + len(said)] == talk[-1]["prompt"] + said:
                assert 4 <= len(prompt) - before - len(said) <= 5
                talk.append(body)
                break
        else:
            talks.append([body])
    assert 1 <= len(talks) <= 4 and max(map(len, talks)) == 3
    assert len(times.ttfts) == len(fake.asked) and times.tokens == sum(
        body["max_tokens"] for body in fake.asked
    )


def test_no_turn_begins_after_the_time():
    load = Conversations((1,), 6, (10, 12), (50, 50), (4, 5), (2, 3), thinking=0.05)
    fake = Completions()
    times = fake.run(lambda address: load.play(address, 10, 0.3, (0,)))
    assert 1 <= len(fake.asked) == len(times.ttfts) < 50 and times.seconds < 5


def test_the_loads_are_those_of_the_issue():
    """Tokens in and out; conversations as in vLLM's multi-turn benchmark; three rising rates."""
    cold, talks, questions = LARGE.values()
    assert (cold.tokens, cold.max_tokens) == (8192, 256)
    assert (questions.document, questions.question, questions.max_tokens) == (32768, 128, 64)
    assert (talks.common, talks.own, talks.turn) == (500, (1000, 5000), (120, 160))
    assert talks.answer == (80, 120) and [2 * n for n in talks.turns] == [12, 18]
    assert LARGE.keys() == SMALL.keys()
    for load in (*LARGE.values(), *SMALL.values()):
        assert len(load.rates) == 3 and sorted(set(load.rates)) == list(load.rates)


def _row(engine: str, rate: float, scale: float = 1.0, name: str = "cold") -> Row:
    times = Times([0.1 * scale, 0.3 * scale], [0.01 * scale] * 99 + [0.02 * scale], 400, 2 * scale)
    row = Row.of(
        times,
        load=LARGE[name].name,
        shape="Llama-3.1-8B",
        engine=engine,
        rate=rate,
        seconds=30,
        reuses=7,
    )
    row.environment = dict.fromkeys(("gpu", "vllm", "torch", "triton", "date", "commit"), "x")
    return row


def test_a_point_by_hand():
    row = _row("stock", 1)
    assert (row.requests, row.ttft, row.speed) == (2, pytest.approx(200), 200)
    assert row.ttft_p99 == pytest.approx(298)  # between the two, linearly
    assert row.gap_p99 == pytest.approx(10.1)


def test_the_report(tmp_path):
    file, page = tmp_path / "loads.jsonl", tmp_path / "benchmarks.md"
    page.write_text("before\n")
    report.main(page, file)
    assert page.read_text() == "before\n", "no results yet"
    rows = [_row(engine, rate) for engine in ("stock",) for rate in (2, 1)]
    rows += [_row(DEEP.name, rate, 0.5) for rate in (1, 2)] + [_row(DEEP.name, 4, name="questions")]
    results.write(file, rows)
    for _ in range(2):  # the second finds the section there
        report.main(page, file)
    text = page.read_text()
    assert text.startswith("before\n") and text.count("loads: begin") == 1
    deep = "| 1 | `conservative, deep` | 2 | 7 | 100 (0.50) | 149 (0.50) | 5 (0.50) | 400 (2.00) |"
    assert "| 1 | `stock` | 2 | 7 | 200 | 298 | 10 | 200 |\n" + deep in text
    assert text.index(deep) < text.index("| 2 | `stock` |") and "loads/results/cold.svg" in text
    # Without stock vLLM's there is nothing to compare with.
    assert "| 4 | `conservative, deep` | 2 | 7 | 200 | 298 | 10 | 200 |" in text
    assert "conversations.svg" not in text and not (tmp_path / "conversations.svg").exists()
    for name in ("cold.svg", "questions.svg"):
        assert "<svg" in (tmp_path / name).read_text()


def test_engines_one_after_the_other(tmp_path, monkeypatch):
    """A run of a part keeps the file's other rows, and replaces its own."""
    served, played = [], []

    @contextmanager
    def serving(shape, flags):
        served.append(flags)
        yield argparse.Namespace(address=f"http://{len(served)}")

    async def play(self, address, rate, seconds, seed):
        played.append((self.name, address, rate, seconds, seed))
        return Times([0.1 * len(served)], [0.01], 8, 1.0)

    monkeypatch.setattr(run, "serving", serving)
    monkeypatch.setattr(run, "reuses", lambda address: 5 * len(played))
    for load in {type(load) for load in LARGE.values()}:
        monkeypatch.setattr(load, "play", play)
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    out = ["--out", str(tmp_path / "loads.jsonl"), "--commit", "c", "--seconds", "9"]
    run.main(parser.parse_args(out))
    assert served[0] == []  # its defaults
    for flags, pruning in zip(served[1:], (MEASURED, DEEP)):
        assert flags[0] == "--lazyllm-config" and json.loads(flags[1]) == pruning.config
    rows = results.read(tmp_path / "loads.jsonl", Row)
    assert len(rows) == 27 and {row.reuses for row in rows} == {5}
    by_engine = [
        [each for _, at, *each in played if at == f"http://{n}"] for n in range(1, 1 + len(served))
    ]
    assert by_engine[0] == by_engine[1] == by_engine[2] and len(by_engine[0]) == 12
    assert len({each[-1] for each in by_engine[0]}) == 12, "a seed twice: its prompts are cached"
    run.main(parser.parse_args([*out, "--engines", "exact", "--loads", "cold", "--rates", "2"]))
    again = results.read(tmp_path / "loads.jsonl", Row)
    assert len(again) == 27
    (changed,) = [row for row in again if row not in rows]
    assert changed.key == (LARGE["cold"].name, "Llama-3.1-8B", MEASURED.name, 2)
    assert changed.ttft == pytest.approx(400)
    assert changed.environment["commit"] == "c" and changed.environment["vllm"]


def test_a_server_that_does_not_start(monkeypatch):
    says = [sys.executable, "-c", "print('no room')"]
    monkeypatch.setattr(server, "_command", lambda folder, port: says)
    with pytest.raises(RuntimeError, match="did not start:\nno room"):
        with server.serving({}, []):
            pass


def test_a_checkpoint_keeps_its_weights(monkeypatch, tmp_path):
    says = [sys.executable, "-c", "import sys; print(sys.argv)"]
    monkeypatch.setattr(server, "_command", lambda folder, port: says)
    for is_dummy in (True, False):
        with pytest.raises(server.ServerError) as told, server.serving(tmp_path, []):
            pass
        assert ("dummy" in str(told.value)) == is_dummy
        (tmp_path / "model.safetensors").touch()


def test_how_many_went_on(monkeypatch):
    text = (
        "# TYPE vllm:lazyllm_reuses counter\n"
        'vllm:lazyllm_reuses_total{engine="0"} 3.0\nvllm:lazyllm_reuses_total{engine="1"} 4.0\n'
        "# TYPE vllm:lazyllm_reused_tokens counter\n"
        'vllm:lazyllm_reused_tokens_total{engine="0"} 9.0\n'
    )
    monkeypatch.setattr(metrics, "_SETTLE", 0)
    monkeypatch.setattr(metrics.httpx, "get", lambda *_, **__: argparse.Namespace(text=text))
    assert metrics.reuses("http://any") == 7
