"""What the GPU knows of each request's prompt: a row of counts, owned here."""

from typing import NamedTuple

import torch

from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from lazyllm_vllm.kernels.selection import PromptCounts
from lazyllm_vllm.plan.request_plan import RequestPlan


class RequestRow(NamedTuple):
    """One request's row, brought to the CPU; see ``kernels.selection.PromptCounts``."""

    num_prompt: int
    kept: list[int]
    capacity: list[int]
    prompt_keys: list[int]

    @classmethod
    def of(cls, numbers: list[int]) -> "RequestRow":
        stages = (len(numbers) - 1) // 3
        columns = (numbers[1 + at * stages : 1 + (at + 1) * stages] for at in range(3))
        return cls(numbers[0], *columns)

    @property
    def revived(self) -> list[int]:
        """Prompt tokens revived so far, by stage."""
        return [now - then for now, then in zip(self.prompt_keys, self.kept)]

    @property
    def is_full(self) -> bool:
        """Whether no stage has room for another revived token."""
        return all(keys >= most for keys, most in zip(self.prompt_keys, self.capacity))


class RequestTable:
    """Rows are indexed as vLLM's request states are.

    Keys in stage s are ``prompt_keys[s]`` and one for each token after the prompt, so the slot of
    the token at position p >= num_prompt is ``prompt_keys[s] + p - num_prompt``.
    """

    def __init__(self, num_stages: int, max_num_reqs: int, device: torch.device) -> None:
        self._rows = StagedWriteTensor(
            (max_num_reqs, 1 + 3 * num_stages), dtype=torch.int32, device=device
        )
        num_prompt, *others = self._rows.gpu.split([1] + 3 * [num_stages], dim=1)
        self.counts = PromptCounts(num_prompt[:, 0], *others)

    @property
    def gpu(self) -> torch.Tensor:
        """``[max_num_reqs, 1 + 3 * stages]`` int32, all columns side by side."""
        return self._rows.gpu

    def add(self, index: int, plan: RequestPlan) -> None:
        """Stage the row of a request about to be prefilled."""
        row = RequestRow(plan.num_prompt, plan.kept, plan.capacity, plan.kept)
        self._rows.stage_write(index, 0, [row.num_prompt, *sum(row[1:], ())])

    def apply_staged_writes(self) -> None:
        self._rows.apply_write()

    def row(self, index: int) -> torch.Tensor:
        """``[1 + 3 * stages]``, a copy made on the device's stream, for ``RequestRow.of``."""
        return self._rows.gpu[index].clone()
