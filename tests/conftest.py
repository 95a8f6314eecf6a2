"""What every test needs: the CPU settings, before vLLM is imported, and a small real model."""

import os
from pathlib import Path

import pytest

from benchmarks import checkpoints
from benchmarks.cpu import use_cpu_settings
from benchmarks.engine import PRELOADED

use_cpu_settings()
# Several engines side by side, each with one thread, wherever there is a core for it.
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where engines are forked, they are forked from what has imported it.
PRELOADED.append("harness.quick")
paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct's checkpoint."""
    return checkpoints.smollm2()


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """The folder of Gemma 3 270M's checkpoint."""
    return checkpoints.gemma3()


@pytest.fixture(scope="module")
def open_engine():
    """Opens ``EngineUnderTest``s that are closed after the module's tests."""
    from harness.engine import EngineUnderTest

    opened = []

    def make(*args, **kwargs) -> EngineUnderTest:
        opened.append(EngineUnderTest(*args, **kwargs))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()
