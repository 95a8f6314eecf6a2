"""``vllm serve`` as a user runs it."""

import json
import math
import re
import runpy
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from harness.bad_requests import REFUSED, SERVED, body_of
from harness.server import NAME, VLLM, scrape, serve
from transformers import AutoTokenizer

from benchmarks.passkey import passkey_prompt
from lazyllm_vllm.cli.main import main as lazyllm
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.schedule import Schedule

CONFIG = {
    "prune": [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}],
    "min_prompt_tokens": 256,
    "schedules": {"mild": [{"layer": 20, "keep": 0.6}]},
}
BOTH = ("true", "false")  # pruned or not


@pytest.fixture(scope="module")
def server(smollm2, tmp_path_factory):
    """A running server that records a trace: its address, its log file and its process."""
    log = tmp_path_factory.mktemp("serve") / "log"
    flags = ["--lazyllm-config", json.dumps(CONFIG), "--max-model-len", "1536"]
    # Refused requests are no errors, whose stack a server for development would log.
    flags += ["--max-num-seqs", "4", "--no-log-error-stack"]
    traced = {"LAZYLLM_TRACE": "1", "VLLM_SERVER_DEV_MODE": "1"}
    with serve(smollm2, log, *flags, **traced) as (address, process):
        yield address, log, process


def _chat(smollm2, words: int) -> tuple[dict, str]:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, answer = passkey_prompt(tokenizer, words, seed=3, depth=0.5)
    body = {"model": NAME, "prompt": ids, "max_tokens": 16, "temperature": 0}
    return body, answer


def _scrape(address: str) -> dict[tuple[str, str | None], float]:
    """What ``/metrics`` has of LazyLLM's one engine, by name and its own label's value."""
    found = scrape(address)
    assert {engine for engine, *_ in found} == {"0"}
    return {(name, own): value for (_, name, own), value in found.items()}


def _scrape_until(address: str, enough) -> dict:
    """As soon as it is enough, which may be a step after an answer has come or a request left."""
    for _ in range(20):
        found = _scrape(address)
        if enough(found):
            break
        time.sleep(0.5)
    return found


# Prompt tokens, tokens to generate, and what a request sets for itself.
LOAD = (
    (300, 4, {}),
    (310, 2, {"lazyllm": "off"}),
    (320, 2, {"lazyllm": "mild", "lazyllm_revive": "off"}),
    (330, 2, {"lazyllm_keep": 1.5, "lazyllm_revive": "off"}),
    (256, 1, {}),
    (255, 2, {}),
)


def test_metrics(server):
    """After a known load the counts are those of the schedule."""
    address, _, _ = server
    before = _scrape(address)
    for num_prompt, max_tokens, extra in LOAD:
        body = {"model": NAME, "prompt": [100 + i for i in range(num_prompt)]}
        body |= {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
        response = httpx.post(
            f"{address}/v1/completions", json=body | {"vllm_xargs": extra}, timeout=300
        )
        assert response.status_code == 200, response.text

    def requests(found: dict) -> float:
        return sum(found["requests", pruned] - before["requests", pruned] for pruned in BOTH)

    after = _scrape_until(address, lambda found: requests(found) >= len(LOAD))
    grown = {key: after[key] - before[key] for key in after}

    schedule = Schedule.build(parse_config(CONFIG), 30)
    plans = [schedule.plan(n, schedule.setting(extra)) for n, _, extra in LOAD]
    pruned = sum(plan.is_pruned for plan in plans)
    prompt_tokens = sum(n for n, _, _ in LOAD)
    assert (grown["requests", "true"], grown["requests", "false"]) == (pruned, 2) == (4, 2)
    assert grown["prompt_tokens", None] == prompt_tokens
    kept = [sum(plan.kept[stage] for plan in plans) for stage in range(3)]
    assert [grown["kept_tokens", str(stage)] for stage in range(3)] == kept
    # Of the first request alone something may come back, in each step after its first token.
    revived = [grown["revived_tokens", str(stage)] for stage in range(3)]
    room = [most - kept for most, kept in zip(plans[0].capacity, plans[0].kept)]
    assert revived[0] == 0 < revived[1] and all(0 <= r <= m for r, m in zip(revived, room))
    assert grown["selecting_steps", None] == 3
    assert grown["pairs", None] == 30 * prompt_tokens
    computed = sum(n * (k + r) for n, k, r in zip((10, 10, 10), kept, revived))
    assert grown["computed_pairs", None] == computed
    assert after["aux_cache_blocks", None] == 0


def _aux_blocks(num_prompt: int, address: str) -> int:
    """Blocks of the prompt group that a request of the server's own schedule has."""
    metrics = httpx.get(f"{address}/metrics", timeout=30).text
    block_size = int(re.search(r'vllm:cache_config_info\{.*?\bblock_size="(\d+)"', metrics)[1])
    schedule = Schedule.build(parse_config(CONFIG), 30)
    page = block_size * 2 * 3 * 64 * 4  # keys and values of 3 heads of 64 in fp32
    needs = BlockNeeds(schedule, block_size, page, 576 * 4)
    return needs.prompt_blocks(schedule.plan(num_prompt))


def test_explain_asks_a_server(server, smollm2, tmp_path):
    address, *_ = server
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    ids, answer = passkey_prompt(tokenizer, 500, seed=3, depth=0.5)
    files = {name: tmp_path / name for name in ("prompt", "page", "json")}
    files["prompt"].write_text(tokenizer.decode(ids))
    asked = ["explain", "--url", f"{address}/v1", "--prompt-file", files["prompt"]]
    asked += ["--max-tokens", 12, "--out", files["page"], "--json", files["json"]]
    for _ in range(2):  # the second time all of the prompt could come out of the prefix cache
        lazyllm([str(part) for part in asked])
        told = json.loads(files["json"].read_text())
        assert [token["id"] for token in told["prompt"]] == ids
        assert answer in "".join(token["text"] for token in told["answer"])
        counts = [len(kept) for kept in told["kept"]]
        assert counts == [len(ids), math.ceil(len(ids) / 2), math.ceil(len(ids) / 4)]
        assert all(len(step["selected"][2]) == counts[2] for step in told["steps"])
    assert files["page"].read_text().startswith("<!doctype html>")


def test_bad_requests(server):
    """Each is a 4xx, of our own fields one that names it, and a good request is answered after it
    as before."""
    address, *_ = server
    with httpx.Client(base_url=address, timeout=60) as client:

        def ask(case: dict | str | bytes, **headers) -> httpx.Response:
            headers["content-type"] = "application/json"
            return client.post("/v1/completions", content=body_of(case), headers=headers)

        def text(case: dict) -> str:
            return ask(case).json()["choices"][0]["text"]

        expected = text({})
        for name, case in REFUSED.items():
            bad = ask(case)
            assert 400 <= bad.status_code < 500, (name, bad.text[:300])
            if name.startswith("lazyllm"):
                assert name.split()[0] in bad.text, name
            assert text({}) == expected, name
        for name, case in SERVED.items():
            assert text(case) == expected, name
        # Two at once of one name are two requests.
        with ThreadPoolExecutor() as pool:
            both = pool.map(lambda _: ask({}, **{"x-request-id": "twice"}), range(2))
        assert [each.json()["choices"][0]["text"] for each in both] == [expected] * 2
        chat = {"model": NAME, "messages": [], "vllm_xargs": {"lazyllm": "fastest"}}
        assert client.post("/v1/chat/completions", json=chat).status_code == 400


def test_serve(server, smollm2, tmp_path, monkeypatch, capsys):
    address, log, process = server
    text = log.read_text()
    assert "LazyLLM is on" in text and "stage 2: layers 21 to 30, keep 0.25" in text

    # A streamed chat completion, by the recipe for it.
    document = tmp_path / "document"
    document.write_text("The sky is blue. " * 90)
    recipe = Path(__file__).parents[2] / "examples/openai_stream.py"
    asked = [address, NAME, str(document), "What colour is the sky?", "--max-tokens", "8"]
    settings = ["--set", "lazyllm=mild", "lazyllm_keep=1.1"]
    monkeypatch.setattr(sys, "argv", [str(recipe), *asked, *settings])
    runpy.run_path(str(recipe), run_name="__main__")
    told = capsys.readouterr().out
    assert "blue" in told.lower() and int(re.search(r"(\d+) prompt tokens", told)[1]) > 256

    # A request that asks for what pruning cannot give: a 400 for it alone.
    body, answer = _chat(smollm2, 900)
    for asked in ({"prompt_logprobs": 1}, {"echo": True, "logprobs": 1}):
        bad = httpx.post(f"{address}/v1/completions", json=body | asked, timeout=60)
        assert bad.status_code == 400 and "prompt_logprobs" in bad.text

    # Settings of requests: side by side, one that keeps every token and so has them after all.
    # In Triton's interpreter log-probabilities take long, so of a prompt that is just long enough.
    asked = body | {"prompt": body["prompt"][:256], "vllm_xargs": {"lazyllm": "off"}}
    asked |= {"max_tokens": 1, "prompt_logprobs": 1}
    with ThreadPoolExecutor() as pool:
        bodies = (asked, body, body | {"vllm_xargs": {"lazyllm": "mild", "lazyllm_keep": 1.2}})
        post = partial(httpx.post, f"{address}/v1/completions", timeout=300)
        off, *pruned = pool.map(lambda each: post(json=each), bodies)
    assert off.status_code == 200 and len(off.json()["choices"][0]["prompt_logprobs"]) == 256
    assert all(r.status_code == 200 and answer in r.json()["choices"][0]["text"] for r in pruned)
    for wrong in ({"lazyllm": "fastest"}, {"lazyllm_keep": 0.5}, {"lazyllm_revive": "maybe"}):
        bad = httpx.post(f"{address}/v1/completions", json=body | {"vllm_xargs": wrong}, timeout=60)
        (field,) = wrong
        assert bad.status_code == 400 and field in bad.text, bad.text

    # A prompt that is not pruned has them.
    short = body | {"prompt": "The sky is blue", "max_tokens": 1, "echo": True, "logprobs": 1}
    good = httpx.post(f"{address}/v1/completions", json=short, timeout=60)
    assert good.status_code == 200
    first, *rest = good.json()["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None and len(rest) == 4 and all(logprob < 0 for logprob in rest)

    # A client that goes away in the middle.
    with httpx.stream(
        "POST",
        f"{address}/v1/completions",
        timeout=300,
        json=body | {"stream": True, "max_tokens": 400, "ignore_eos": True},
    ) as response:
        lines = response.iter_lines()  # httpx goes away with it
        next(lines)
        blocks = _aux_blocks(len(body["prompt"]), address)
        held = _scrape_until(address, lambda found: found["aux_cache_blocks", None] > 0)
        assert held["aux_cache_blocks", None] == blocks > 0

    # The server is as good as before.
    good = httpx.post(f"{address}/v1/completions", json=body, timeout=300)
    assert good.status_code == 200 and answer in good.json()["choices"][0]["text"]
    for _ in range(60):
        metrics = httpx.get(f"{address}/metrics", timeout=30).text
        running = [m for m in metrics.splitlines() if m.startswith("vllm:num_requests_running")]
        used = [m for m in metrics.splitlines() if m.startswith("vllm:kv_cache_usage_perc")]
        if running and float(running[0].split()[-1]) == 0:
            break
        time.sleep(1)
    assert float(running[0].split()[-1]) == 0, "the aborted request still runs"
    assert float(used[0].split()[-1]) == 0, "blocks were lost"
    gone = _scrape_until(address, lambda found: found["aux_cache_blocks", None] == 0)
    assert gone["aux_cache_blocks", None] == 0
    assert "LazyLLM:" in log.read_text() and "pairs computed" in log.read_text()

    assert "Traceback" not in log.read_text()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    # vLLM itself may log that its engine is gone before its API server is: a race of its own.
    before, shutdown = log.read_text().split("[shutdown]", 1)
    assert "Application shutdown complete" in shutdown and "lazyllm_vllm" not in shutdown


def test_a_bad_flag_stops_the_server_at_once(smollm2):
    command = [VLLM, "serve", smollm2, "--lazyllm-config", '{"keep": 1}']
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert "--lazyllm-config" in last and "keep: unknown field" in last
