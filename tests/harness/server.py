"""``vllm serve``, as ``harness.quick_vllm`` runs it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from lazyllm_vllm.observe.metrics import METRICS, PREFIX

VLLM = str(Path(sys.executable).with_name("vllm"))
NAME = "served"  # what requests call the model


@contextmanager
def serve(model: Path, log: Path, *flags: str, **environment: str) -> Iterator:
    """A running server: its address and its process.

    Args:
        log: file for what it prints.
        flags: of ``vllm serve``, beside those for a CPU.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "harness.quick_vllm", "serve", str(model)]
    command += ["--served-model-name", NAME, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--dtype", "float32", "--enforce-eager", *flags]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment
        )
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(400):
            assert process.poll() is None, log.read_text()[-5000:]
            try:
                if httpx.get(f"{address}/health", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(1)
        else:
            raise AssertionError(log.read_text()[-5000:])
        yield address, process
    finally:
        process.terminate()  # so that it ends its engines
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()


def scrape(address: str) -> dict[tuple[str, str, str | None], float]:
    """What ``/metrics`` has of LazyLLM, by engine, name and own label's value."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{address}/metrics", timeout=30).text):
        for sample in family.samples:
            if sample.name.startswith(PREFIX) and not sample.name.endswith("_created"):
                labels = dict(sample.labels)
                assert labels.pop("model_name") == NAME
                engine, own = labels.pop("engine"), next(iter(labels.values()), None)
                name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                found[engine, name, own] = sample.value
    assert {name for _, name, _ in found} == {metric.name for metric in METRICS}
    return found
