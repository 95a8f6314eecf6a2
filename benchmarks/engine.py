"""A vLLM engine in a process of its own, which runs the functions that it is asked to run: the one
way in which benchmarks, demo and tests use engines."""

import gc
import importlib
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

# What an engine imports first. On a CPU one process imports it for all engines, which are forked
# from it; with CUDA a forked process could not use the GPU.
PRELOADED = ["vllm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.gpu.model_runner"]


@cache
def _context():
    import torch

    if torch.version.cuda is not None:
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


class Engine:
    """An engine that starts up.

    Args:
        start: makes the ``vllm.LLM``; a function of a module, with picklable arguments.
        arguments: for ``start``.
        functions: name of the module whose functions ``run`` calls with the engine.
        log: file for what the engine prints.
        has_workers: whether it starts processes of its own, as for tensor parallelism. It must be
            closed, or this process does not end.
    """

    def __init__(
        self,
        start: Callable,
        arguments: dict,
        functions: str,
        log: Path,
        has_workers: bool = False,
    ) -> None:
        self.log = log
        self._pipe, theirs = _context().Pipe()
        self._process = _context().Process(
            target=_serve,
            args=(theirs, start, arguments, functions, log),
            daemon=not has_workers,  # such a process may have no children
        )
        self._process.start()
        theirs.close()

    def ready(self) -> dict[str, str]:
        """Wait until the engine is up; versions and device. Raises RuntimeError if it fails."""
        return self._receive()

    def run(self, function: str, **arguments) -> Any:
        """``function(llm, **arguments)`` there. Raises RuntimeError if it fails."""
        self._pipe.send((function, arguments))
        return self._receive()

    def _receive(self) -> Any:
        try:
            failed, result = self._pipe.recv()
        except (EOFError, ConnectionResetError):  # the latter if it left what it was told unread
            failed, result = True, "the engine ended"
        if failed:
            raise RuntimeError(f"{result}\n{self.log.read_text()[-3000:]}")
        return result

    def close(self) -> None:
        """End it, and its workers with it: one that outlives its engine keeps the GPU's memory from
        the next."""
        workers = _children(self._process.pid)
        self._pipe.close()
        self._process.join(20)
        self._process.kill()
        _, left = psutil.wait_procs(workers, timeout=10)
        for worker in left:
            with suppress(psutil.NoSuchProcess):
                worker.kill()
        psutil.wait_procs(left, timeout=10)


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _serve(pipe, start: Callable, arguments: dict, functions: str, log: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdin.close()
    gc.freeze()  # vLLM collects garbage as it starts, and what was imported before is none
    try:
        llm = start(**arguments)
        module = importlib.import_module(functions)
        pipe.send((False, _versions()))
        while True:
            try:
                function, given = pipe.recv()
            except EOFError:
                return
            pipe.send((False, getattr(module, function)(llm, **given)))
    except Exception:  # the parent shows it, with the log's end
        pipe.send((True, traceback.format_exc()))


def _versions() -> dict[str, str]:
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
