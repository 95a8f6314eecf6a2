"""What every test needs: the CPU settings, before vLLM is imported, and a small real model."""

from pathlib import Path

import pytest

from benchmarks.cpu import use_cpu_settings
from benchmarks.smollm2 import checkpoint

use_cpu_settings()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct's checkpoint."""
    return checkpoint()
