"""``vllm serve`` as a process, with children: started, waited for, stopped."""

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

from benchmarks.serving.client import NAME

_ROOT = Path(__file__).parents[2]
_START, _STOP = 600, 60  # seconds that it may take


class ServerError(RuntimeError):
    """It did not start."""


class Server:
    """Starts it.

    Args:
        folder: the model's. Without weights in it the model gets random ones, and the server takes
            prompts of token ids, since it has no tokenizer.
        flags: of ``vllm serve``, beside those that it needs to be asked.
        log: file for what it prints.

    Attributes:
        address: where it listens.
    """

    def __init__(self, folder: Path, flags: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.folder, self.log = f"http://127.0.0.1:{port}", folder, log
        self.has_weights = any(folder.glob("*.safetensors"))
        command = _command(folder, port) + flags
        environment = dict(os.environ)
        if not self.has_weights:
            command += ["--load-format", "dummy", "--skip-tokenizer-init"]
            command += ["--worker-extension-cls", "benchmarks.serving.weights.RandomWeights"]
            others = os.environ.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *([others] if others else [])])
            # The mode has the one call that fills the weights.
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the load, which ends it when all have ended
            )

    @property
    def shape(self) -> dict:
        """The model's config.json."""
        return json.loads((self.folder / "config.json").read_text())

    def wait_until_up(self) -> None:
        """And until it has weights. Raises ServerError."""
        end = time.monotonic() + _START
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() > end:
                raise ServerError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(0.5)
        if not self.has_weights:
            asked = {"method": "randomize_weights"}
            answer = httpx.post(f"{self.address}/collective_rpc", json=asked, timeout=_START)
            if answer.status_code != 200:
                log = self.log.read_text()[-3000:]
                raise ServerError(f"no weights: {answer.text[:500]}\n{log}")

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> int | None:
        """It and what it started, whose GPU memory is free afterwards. Its exit code, or None: it
        had to be killed."""
        if self.process.poll() is not None:
            return self.process.returncode
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(signal.SIGINT)  # as Ctrl-C does, so that it ends its engine
        try:
            code = self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            code = None
            self.process.kill()
            self.process.wait()
        _, alive = psutil.wait_procs(started, timeout=10)
        for one in alive:
            one.kill()
        psutil.wait_procs(alive, timeout=10)
        return code


def _command(folder: Path, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(folder)),
        *("--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)),
        "--disable-uvicorn-access-log",
    ]


@contextmanager
def serving(model: dict | Path, flags: list[str], log: Path | None = None) -> Iterator[Server]:
    """A server that is up.

    Args:
        model: its config.json, for random weights, or its folder.
        flags, log: as for ``Server``. None: a file that is gone afterwards.

    Raises:
        ServerError: it did not start.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = model if isinstance(model, Path) else Path(scratch)
        if isinstance(model, dict):
            Path(scratch, "config.json").write_text(json.dumps(model))
        server = Server(folder, flags, log or Path(scratch, "log"))
        try:
            server.wait_until_up()
            yield server
        finally:
            server.stop()
