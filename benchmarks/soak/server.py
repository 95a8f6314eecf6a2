"""The server under load: ``vllm serve``, a process of its own with children."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

from benchmarks.soak.client import NAME
from benchmarks.speed.shapes import SHAPES

ROOT = Path(__file__).parents[2]
_START = 600  # seconds that it may take to start
_STOP = 60
MIB = 2**20

# A Llama for a CPU.
SMALL = {
    "small": SHAPES["Llama-3.1-8B"]
    | {
        "torch_dtype": "float32",
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 4096,
    }
}


class ServerError(Exception):
    """It did not start."""


@dataclass(frozen=True)
class Model:
    """Attributes:
    folder: with its config.json.
    is_dummy: whether it has no weights.
    """

    folder: Path
    is_dummy: bool

    @classmethod
    def of(cls, name: str, scratch: Path) -> "Model":
        """A checkpoint's folder, or one with the config.json of a shape's name, put in
        ``scratch``."""
        if name not in SHAPES | SMALL:
            folder = Path(name)
            return cls(folder, not any(folder.glob("*.safetensors")))
        folder = scratch / "model"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps((SHAPES | SMALL)[name]))
        return cls(folder, True)

    @property
    def shape(self) -> dict:
        """Its config.json."""
        return json.loads((self.folder / "config.json").read_text())


class Server:
    """Starts it; what it prints goes to ``log``.

    Args:
        flags: of ``vllm serve``, beside those that the load needs.

    Attributes:
        address: where it listens.
    """

    def __init__(self, model: Model, flags: list[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.address, self.model, self.log = f"http://127.0.0.1:{port}", model, log
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model.folder)]
        command += ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port)]
        command += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
        environment = dict(os.environ)
        if model.is_dummy:
            command += ["--load-format", "dummy", "--skip-tokenizer-init"]
            command += ["--worker-extension-cls", "benchmarks.soak.weights.RandomWeights"]
            # For the one call that fills the weights.
            environment["VLLM_SERVER_DEV_MODE"] = "1"
            others = environment.get("PYTHONPATH")
            environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *([others] if others else [])])
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command + flags,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the load, which ends it when all have ended
            )

    def wait_until_up(self) -> None:
        """Raises ServerError."""
        began = time.monotonic()
        while not self._is_up():
            if self.process.poll() is not None or time.monotonic() - began > _START:
                raise ServerError(f"the server did not start:\n{self.log.read_text()[-3000:]}")
            time.sleep(1)
        if self.model.is_dummy:
            asked = {"method": "soak_randomize"}
            answer = httpx.post(f"{self.address}/collective_rpc", json=asked, timeout=_START)
            if answer.status_code != 200:
                raise ServerError(f"no weights: {answer.text[:500]}")

    def _is_up(self) -> bool:
        try:
            return httpx.get(f"{self.address}/health", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def memory(self) -> float:
        """MiB resident in all its processes together."""
        total = 0
        try:
            root = psutil.Process(self.process.pid)
            processes = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return 0.0
        for process in processes:
            try:
                total += process.memory_info().rss
            except psutil.NoSuchProcess:
                pass
        return round(total / MIB, 1)

    def stop(self) -> int | None:
        """As Ctrl-C does; its exit code, or None: it had to be killed."""
        if self.process.poll() is not None:
            return self.process.returncode
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(_STOP)
        except subprocess.TimeoutExpired:
            for process in psutil.Process(self.process.pid).children(recursive=True):
                process.kill()
            self.process.kill()
            self.process.wait()
            return None

    def complaints(self, begin: int = 0) -> list[str]:
        """Lines of the log that tell of an error, from a byte on, without stacks."""
        lines = self.log.read_bytes()[begin:].decode(errors="replace").splitlines()
        return [line[:200] for line in lines if " ERROR " in line and "]   " not in line]
