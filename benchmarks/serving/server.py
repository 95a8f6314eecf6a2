"""``vllm serve`` of a shape with random weights: started, waited for, stopped."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.serving.client import NAME
from lazyllm_vllm.observe.metrics import PREFIX

_ROOT = Path(__file__).parents[2]
_START, _STOP = 600, 60  # seconds that it may take
_SETTLE = 1.0  # seconds until the worker has told what it counted last


@contextmanager
def serving(shape: dict, flags: list[str]) -> Iterator[str]:
    """A running server: its address. It takes prompts of token ids, since it has no tokenizer.

    Args:
        shape: the model's config.json.
        flags: of ``vllm serve``, beside those that a model without weights needs.

    Raises:
        RuntimeError: it did not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        address, log = f"http://127.0.0.1:{port}", Path(folder, "log")
        with log.open("w") as output:
            process = subprocess.Popen(
                _command(folder, port) + flags,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=_environment(),
            )
        try:
            _wait(process, address, log)
            yield address
        finally:
            _stop(process)


def _command(folder: str, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", folder),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--load-format", "dummy", "--skip-tokenizer-init", "--disable-uvicorn-access-log"),
        *("--worker-extension-cls", "benchmarks.serving.weights.RandomWeights"),
    ]


def _environment() -> dict[str, str]:
    others = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(_ROOT), *([others] if others else [])])
    # The mode has the one call that fills the weights.
    return os.environ | {"PYTHONPATH": path, "VLLM_SERVER_DEV_MODE": "1"}


def _wait(process: subprocess.Popen, address: str, log: Path) -> None:
    """Until it is up, and has weights."""
    end = time.monotonic() + _START
    while not _is_up(address):
        if process.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
    asked = {"method": "randomize_weights"}
    answer = httpx.post(f"{address}/collective_rpc", json=asked, timeout=_START)
    if answer.status_code != 200:
        raise RuntimeError(f"no weights: {answer.text[:500]}\n{log.read_text()[-3000:]}")


def _is_up(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def reuses(address: str) -> int:
    """Requests of a server that went on from others (``reuse: deep``), now that none runs."""
    time.sleep(_SETTLE)
    found = 0.0
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics", timeout=30).text):
        for sample in family.samples:
            found += sample.value if sample.name == f"{PREFIX}reuses_total" else 0.0
    return round(found)


def _stop(process: subprocess.Popen) -> None:
    """It and what it started, whose GPU memory is free afterwards."""
    try:
        started = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        started = []
    if process.poll() is None:
        process.send_signal(signal.SIGINT)  # as Ctrl-C does, so that it ends its engine
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    _, alive = psutil.wait_procs(started, timeout=10)
    for one in alive:
        one.kill()
    psutil.wait_procs(alive, timeout=10)
