"""Faults under ``vllm serve``: everyone is told, or served, and nobody waits for ever.

Slow: a fault that ends a server takes a server, and stock vLLM's is the bar.
"""

import json
import signal
import threading
import time
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path

import httpx
import psutil
import pytest
from harness import faults
from harness.server import NAME, serve
from harness.tiny import tiny_model

pytestmark = pytest.mark.slow

CONFIG = {"prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}]}
CONFIG |= {"min_prompt_tokens": 64, "reuse": "deep"}
# Prompts of this many tokens are pruned.
LONG = 200
SHORT = faults.SHORT
FLAGS = ["--load-format", "dummy", "--skip-tokenizer-init", "--max-model-len", "4096"]
FLAGS += ["--block-size", "32", "--no-enable-log-requests"]
BOUND = 120  # seconds within which all is over

# What is killed, a part of its process' name, and in how many ranks; and what fails in a request
# (``harness.faults``).
KILLED = {"engine": ("EngineCore", 1), "worker": ("Worker", 2)}
# vLLM's server tells nobody by its exit code that it failed.
VLLMS_END = {"code": 0, "clients": []}
FAILS = ("block_manager", "model_runner", "out_of_memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def server(folder, tmp_path_factory):
    """One that runs prompts in many chunks: its address, process and log."""
    log = tmp_path_factory.mktemp("server") / "log"
    with serve(folder, log, *flags(True, "--max-num-batched-tokens", "64")) as (address, process):
        yield address, process, log


def flags(is_lazy: bool, *others: str) -> list[str]:
    return [*FLAGS, *(["--lazyllm-config", json.dumps(CONFIG)] if is_lazy else []), *others]


def body(num_prompt: int, max_tokens: int, first: int = 5) -> dict:
    prompt = [first + i % 900 for i in range(num_prompt)]
    asked = {"model": NAME, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    return asked | {"ignore_eos": True, "return_token_ids": True}


class Stream(threading.Thread):
    """A client that reads a streamed answer.

    Attributes:
        began: set with the first token.
        tokens: so far; error: what it was told, if it did not end well.
    """

    def __init__(self, address: str, asked: dict) -> None:
        super().__init__(daemon=True)
        self.address, self.asked = address, asked | {"stream": True}
        self.began, self.tokens, self.error = threading.Event(), [], None
        self.start()

    def run(self) -> None:
        try:
            url = f"{self.address}/v1/completions"
            with httpx.stream("POST", url, json=self.asked, timeout=300) as response:
                if response.status_code != 200:
                    self.error = f"status {response.status_code}"
                for line in response.iter_lines():
                    self._read(line.removeprefix("data: "))
        except httpx.HTTPError as error:
            self.error = repr(error)
        if self.error is None and len(self.tokens) < self.asked["max_tokens"]:
            self.error = "it broke off"
        self.began.set()

    def _read(self, event: str) -> None:
        if not event.startswith("{"):
            return
        read = json.loads(event)
        if "error" in read:
            self.error = str(read["error"])
        for choice in read.get("choices", ()):
            self.tokens += choice["token_ids"] or []
            self.began.set()


def family_of(process) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def outcome(process, clients: list[Stream], family: list[psutil.Process]) -> dict:
    """How a server ends: its exit ``code``, and ``clients`` that took a part for the whole. Nobody
    waits for longer than ``BOUND``, and no process is left."""
    for client in clients:
        client.join(BOUND)
        assert not client.is_alive(), "a client waits for ever"
    code = process.wait(BOUND)
    _, left = psutil.wait_procs(family, timeout=BOUND)
    # Where nobody reaps orphans they stay as zombies.
    assert not [one for one in left if one.status() != psutil.STATUS_ZOMBIE]
    return {"code": code, "clients": [c.asked["prompt"][0] for c in clients if not c.error]}


@contextmanager
def decoding(folder: Path, log: Path, is_lazy: bool, ranks: int = 1, **environment):
    """A server, its processes, and clients whose answers have begun and would go on for long."""
    given = flags(is_lazy, "--tensor-parallel-size", str(ranks))
    with serve(folder, log, *given, **environment) as (address, process):
        clients = [Stream(address, body(SHORT, 3000, first=i)) for i in range(3)]
        assert all(client.began.wait(BOUND) and not client.error for client in clients)
        yield address, process, family_of(process), clients


@pytest.mark.parametrize("what", KILLED)
def test_a_process_is_killed(folder, tmp_path, what):
    """While requests decode and one is in its prefill. LazyLLM's server ends as stock vLLM's."""
    (name, ranks), ends = KILLED[what], []
    for is_lazy in (False, True):
        log = tmp_path / f"log-{is_lazy}"
        with decoding(folder, log, is_lazy, ranks) as (address, process, family, clients):
            clients.append(Stream(address, body(3000, 500)))
            time.sleep(0.3)
            victim = [one for one in family if name in " ".join(one.cmdline())][-1]
            victim.send_signal(signal.SIGKILL)
            ends.append(outcome(process, clients, family))
        assert "EngineDeadError" in log.read_text()
    assert ends == [VLLMS_END] * 2


@pytest.mark.parametrize("fault", FAILS)
def test_an_exception_in_one_request(folder, tmp_path, fault):
    """As stock vLLM's engine it survives none, tells everybody, and says what it was."""
    ends = []
    for is_lazy in (False, True):
        log, plugin = tmp_path / f"log-{is_lazy}", tmp_path / f"plugin-{is_lazy}"
        plugin.mkdir()
        has_fault = faults.environment(plugin, fault if is_lazy else f"stock_{fault}")
        with decoding(folder, log, is_lazy, **has_fault) as (address, process, family, clients):
            clients.append(Stream(address, body(LONG, 8)))
            ends.append(outcome(process, clients, family))
        text = log.read_text()
        assert faults.SAID in text and ("OutOfMemoryError" in text) == (fault == "out_of_memory")
    assert ends == [VLLMS_END] * 2


def gauges(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", timeout=30).text
    lines = [line.split("{") for line in text.splitlines() if line.startswith("vllm:")]
    return {line[0]: float(line[-1].split()[-1]) for line in lines}


def until(is_so, seconds: float = 30) -> bool:
    """Wait until it is, but no longer."""
    end = time.monotonic() + seconds
    while not (so := is_so()) and time.monotonic() < end:
        time.sleep(0.1)
    return so


@pytest.mark.parametrize("tokens", (0, 20))
def test_a_client_that_vanishes(server, tokens):
    """In chunked prefill, or after some tokens: its request is gone at once, its blocks are back,
    and who was there beside it says what it says alone."""
    address, process, log = server
    others = [body(LONG, 60, first=i) for i in (100, 200)]

    def ask(asked: dict, salt: str) -> Stream:
        """One whose answer has begun."""
        stream = Stream(address, asked | {"cache_salt": salt})
        assert stream.began.wait(BOUND)
        return stream

    def answer_of(stream: Stream) -> list[int]:
        stream.join(BOUND)
        assert not stream.error
        return stream.tokens

    def holds_nothing() -> bool:
        found = gauges(address)
        names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
        return not any(found[f"vllm:{name}"] for name in (*names, "lazyllm_aux_cache_blocks"))

    singly = [answer_of(ask(other, f"alone {tokens}")) for other in others]
    assert until(holds_nothing)
    before = gauges(address)
    beside = [ask(other, f"beside {tokens}") for other in others]
    leaving = body(3000, 500) | {"stream": True, "cache_salt": f"leaves {tokens}"}
    with closing(HTTPConnection(httpx.URL(address).netloc.decode(), timeout=BOUND)) as left:
        headers = {"content-type": "application/json"}
        left.request("POST", "/v1/completions", json.dumps(leaving), headers)
        assert until(lambda: gauges(address)["vllm:num_requests_running"] == 3)
        if tokens:
            answer = left.getresponse()
            for _ in range(2 * tokens):
                answer.readline()
            answer.close()
    assert [answer_of(stream) for stream in beside] == singly
    assert until(holds_nothing)
    # Counted with the first token.
    grown = gauges(address)["vllm:prompt_tokens_total"] - before["vllm:prompt_tokens_total"]
    assert grown == 2 * LONG + (3000 if tokens else 0)
    assert (
        process.poll() is None and "Traceback" not in log.read_text().split("Available routes")[1]
    )
