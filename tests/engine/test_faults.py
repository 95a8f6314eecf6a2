"""Faults under ``vllm serve``: everyone is told, or served, and nobody waits for ever.

Slow: a fault that ends a server takes a server, and stock vLLM's is the bar.
"""

import json
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait

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
BOUND = 60  # seconds within which all is over

# A fault and which process of the server's is killed for it, by a part of its name; or what fails
# in it (``harness.faults``), and what the log says then.
KILLED = {"the engine": "EngineCore", "a worker": "Worker"}
FAILS = ("block_manager", "model_runner", "out_of_memory")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("tiny"))


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


def all_processes(process) -> list[psutil.Process]:
    root = psutil.Process(process.pid)
    return [root, *root.children(recursive=True)]


def is_over(process, running: list[Stream], family: list[psutil.Process], log) -> dict:
    """Wait until it is. Every client was told, no process is left, and the exit code is an
    error's."""
    began = time.monotonic()
    for stream in running:
        stream.join(BOUND)
        assert not stream.is_alive(), "a client waits for ever"
        assert stream.error, "a client takes a part for the whole"
    told = time.monotonic() - began
    code = process.wait(BOUND)
    assert code != 0
    _, left = psutil.wait_procs(family, timeout=10)
    assert not left, left
    return {"told": told, "over": time.monotonic() - began, "code": code}


@pytest.mark.parametrize("is_lazy", (True, False), ids=("lazyllm", "stock"))
@pytest.mark.parametrize("name", KILLED.values())
@pytest.mark.parametrize("ranks", (1, 2))
def test_a_process_is_killed(folder, tmp_path, is_lazy, name, ranks):
    """While requests decode and one is in its prefill."""
    log = tmp_path / "log"
    given = flags(is_lazy, "--tensor-parallel-size", str(ranks))
    with serve(folder, log, *given) as (address, process):
        running = [Stream(address, body(SHORT, 3000, first=i)) for i in range(3)]
        assert all(stream.began.wait(BOUND) for stream in running)
        running.append(Stream(address, body(3000, 500)))
        time.sleep(0.3)
        family = all_processes(process)
        victim = [one for one in family if name in " ".join(one.cmdline())][-1]
        victim.send_signal(signal.SIGKILL)
        print(is_over(process, running, family, log))
    assert "EngineDeadError" in log.read_text()


@pytest.mark.parametrize("is_lazy", (True, False), ids=("lazyllm", "stock"))
@pytest.mark.parametrize("fault", FAILS)
def test_an_exception_in_one_request(folder, tmp_path, is_lazy, fault):
    """Of its kind stock vLLM's engine survives none, and neither do we: it says what it was."""
    log, plugin = tmp_path / "log", tmp_path / "plugin"
    plugin.mkdir()
    has_fault = faults.environment(plugin, fault if is_lazy else f"stock_{fault}")
    with serve(folder, log, *flags(is_lazy), **has_fault) as (address, process):
        running = [Stream(address, body(SHORT, 3000, first=i)) for i in range(3)]
        assert all(stream.began.wait(BOUND) for stream in running)
        family = all_processes(process)
        running.append(Stream(address, body(LONG, 8)))
        print(is_over(process, running, family, log))
    text = log.read_text()
    assert faults.SAID in text
    assert ("OutOfMemoryError" in text) == (fault == "out_of_memory")


def gauges(address: str) -> dict[str, float]:
    text = httpx.get(f"{address}/metrics", timeout=30).text
    lines = [line.split("{") for line in text.splitlines() if line.startswith("vllm:")]
    return {line[0]: float(line[-1].split()[-1]) for line in lines}


def test_a_client_that_vanishes(folder, tmp_path):
    """In chunked prefill, or in decoding: its request is gone at once, its blocks are back, and who
    was there beside it says what it says alone."""
    given = flags(True, "--max-num-batched-tokens", "64", "--enable-prompt-tokens-details")
    others = [body(LONG, 60, first=i) for i in (100, 200)]
    with serve(folder, tmp_path / "log", *given) as (address, process):

        def ask(asked: dict) -> list[int]:
            answer = httpx.post(f"{address}/v1/completions", json=asked, timeout=300)
            return answer.json()["choices"][0]["token_ids"]

        def held() -> float:
            found = gauges(address)
            names = "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"
            return sum(found[f"vllm:{name}"] for name in (*names, "lazyllm_aux_cache_blocks"))

        singly = [ask(other | {"cache_salt": "alone"}) for other in others]
        for tokens in (0, 20):  # that the client saw
            with ThreadPoolExecutor() as pool:
                beside = [
                    pool.submit(ask, other | {"cache_salt": f"beside {tokens}"}) for other in others
                ]
                leaving = body(3000, 500) | {"stream": True, "cache_salt": f"leaves {tokens}"}
                with httpx.Client(timeout=300) as client:
                    with client.stream("POST", f"{address}/v1/completions", json=leaving) as left:
                        if tokens == 0:
                            time.sleep(0.5)
                            assert gauges(address)["vllm:num_requests_running"] == 3
                        else:
                            lines = left.iter_lines()
                            for _ in range(2 * tokens):
                                next(lines)
                wait(beside)
            assert [one.result() for one in beside] == singly
            for _ in range(20):
                if not held():
                    break
                time.sleep(0.5)
            assert held() == 0
        assert process.poll() is None
    assert "Traceback" not in (tmp_path / "log").read_text()
