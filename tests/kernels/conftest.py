"""Each kernel runs in Triton's interpreter here, and compiled where ``-m gpu`` is asked for."""

import pytest
import torch
from harness import interpreter

from lazyllm_vllm.kernels import dense_scores, rank, select_decode, select_prefill, top_k

if torch.version.cuda is None:
    interpreter.speed_up()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.param


@pytest.fixture
def dtype(device) -> torch.dtype:
    """Of hidden states, queries and keys."""
    return torch.float32 if device == "cpu" else torch.bfloat16


@pytest.fixture
def few_splits(monkeypatch):
    """Let few programs share a request, so that each has several blocks of a long prompt."""

    def use(splits: int) -> None:
        for module in (dense_scores, rank, top_k, select_prefill, select_decode):
            monkeypatch.setattr(module, "num_splits", lambda num_requests: splits)

    return use
