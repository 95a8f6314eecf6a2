"""A worker's prompts whose last token is held back while their later stages run.

The last token is in the batch, but no token of an answer is to be sampled, and vLLM is to give the
same token again. Its kernels go by two numbers on the device: a request whose sequence is shorter
than its prompt is not sampled from, and its next token is the one after those computed.
"""

import numpy as np
import torch

from vllm.utils.torch_utils import async_tensor_h2d

from lazyllm_vllm.runtime.step import Step


class HeldBack:
    """Of the step that runs."""

    def __init__(self) -> None:
        self._which: torch.Tensor | None = None

    def begin_step(self, step: Step, seq_lens: torch.Tensor) -> None:
        """``seq_lens``: ``[requests or more]`` int32, which vLLM reads when it samples, and writes
        in every step."""
        which, turns = np.flatnonzero(step.batch.prefills.is_held_back), step.batch.turns
        if len(which):
            which += step.num_decodes
            if turns is not None:
                which = turns.requests[which]
            self._which = async_tensor_h2d(which, device=seq_lens.device)
            seq_lens[self._which] -= 1

    def end_step(self, index: torch.Tensor, num_computed: torch.Tensor) -> None:
        """Args:
        index: ``[requests]``, rows of ``num_computed``.
        num_computed: ``[rows]`` int32, which vLLM has just advanced.
        """
        if self._which is not None:
            num_computed[index[self._which]] -= 1
            self._which = None
