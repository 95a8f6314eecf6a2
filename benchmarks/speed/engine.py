"""An engine in a process of its own, which measures what it is told to."""

import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path

from benchmarks.speed.shapes import Pruning


class Engine:
    """A vLLM engine on random weights, stock unless it prunes.

    Args:
        shape: the model's config.json.
        pruning: None: stock vLLM.
        options: arguments of ``vllm.LLM``.
        log: file for what the engine prints.
    """

    def __init__(self, shape: dict, pruning: Pruning | None, options: dict, log: Path) -> None:
        self.pruning, self.log = pruning, log
        spawn = multiprocessing.get_context("spawn")
        self._pipe, theirs = spawn.Pipe()
        config = pruning.config if pruning else None
        self._process = spawn.Process(target=_serve, args=(theirs, shape, config, options, log))
        self._process.start()
        theirs.close()

    def ready(self) -> dict:
        """Wait until the engine is up; versions and device."""
        return self._receive()

    def measure(self, what: str, **arguments) -> dict:
        """Run one of ``measure``'s functions."""
        self._pipe.send((what, arguments))
        return self._receive()

    def _receive(self) -> dict:
        try:
            result = self._pipe.recv()
        except EOFError:
            result = {"error": "it ended"}
        if "error" in result:
            tail = self.log.read_text()[-3000:]
            raise RuntimeError(f"{self.pruning}: {result['error']}\n{tail}")
        return result

    def close(self) -> None:
        self._pipe.close()
        self._process.join(20)
        if self._process.is_alive():
            self._process.terminate()


def _serve(pipe, shape: dict, config: dict | None, options: dict, log: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin.close()
    try:
        llm = _start(shape, config, options)
        pipe.send(_versions())
        from benchmarks.speed import measure

        while True:
            try:
                what, arguments = pipe.recv()
            except EOFError:
                return
            pipe.send(getattr(measure, what)(llm, **arguments))
    except Exception:  # the parent tells it, with the log's end
        pipe.send({"error": traceback.format_exc()})


def _start(shape: dict, config: dict | None, options: dict):
    from vllm import LLM

    from benchmarks.weights import randomize

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        llm = LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16", seed=0,
            enable_prefix_caching=False,
            additional_config={"lazyllm": config} if config else {}, **options,
        )  # fmt: skip
    worker = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    randomize(worker.model_runner.model_state.model)
    return llm


def _versions() -> dict:
    import torch
    import triton

    import vllm

    has_gpu = torch.cuda.is_available()
    return {
        "gpu": torch.cuda.get_device_name() if has_gpu else "no GPU",
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
