"""What the GPU knows of each request's prompt: a row of counts, owned here."""

from typing import NamedTuple

import torch

from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from lazyllm_vllm.kernels.selection import PromptCounts
from lazyllm_vllm.plan.request_plan import RequestPlan


class RequestRow(NamedTuple):
    """One request's row, brought to the CPU; see ``kernels.selection.PromptCounts``."""

    num_prompt: int
    state_room: int
    kept: list[int]
    capacity: list[int]
    prompt_keys: list[int]

    @classmethod
    def of(cls, numbers: list[int]) -> "RequestRow":
        stages = (len(numbers) - 2) // 3
        columns = (numbers[2 + at * stages : 2 + (at + 1) * stages] for at in range(3))
        return cls(*numbers[:2], *columns)

    @classmethod
    def unpruned(cls, plan: RequestPlan) -> "RequestRow":
        """Of a request that is not pruned, which the CPU knows."""
        return cls(plan.num_prompt, 0, list(plan.kept), list(plan.capacity), list(plan.kept))

    @property
    def plan(self) -> RequestPlan:
        counts = tuple(self.kept), tuple(self.capacity)
        return RequestPlan(self.num_prompt, *counts, self.state_room)

    @property
    def revived(self) -> list[int]:
        """Prompt tokens revived so far, by stage."""
        return [now - then for now, then in zip(self.prompt_keys, self.kept)]

    @property
    def is_full(self) -> bool:
        """Whether no stage has room for another revived token."""
        return all(keys >= most for keys, most in zip(self.prompt_keys, self.capacity))


class RowCopy:
    """A row of the request table on its way to the CPU, which waits only if it must."""

    def __init__(self, row: torch.Tensor | RequestRow) -> None:
        """``row``: ``[2 + 3 * stages]`` int32 on the device, or one that has arrived."""
        self._event = None
        if isinstance(row, torch.Tensor) and row.is_cuda:
            copy = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            row = copy.copy_(row, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
        self._row = row

    @property
    def is_here(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> RequestRow:
        if self._event is not None:
            self._event.synchronize()
        if isinstance(self._row, torch.Tensor):
            self._row = RequestRow.of(self._row.tolist())
        return self._row


class RequestTable:
    """Rows are indexed as vLLM's request states are.

    Keys in stage s are ``prompt_keys[s]`` and one for each token after the prompt, so the slot of
    the token at position p >= num_prompt is ``prompt_keys[s] + p - num_prompt``.

    Writes are staged until ``apply_staged_writes``: a launch that a step needs if it reads the
    table, and that otherwise can wait until its kernels are started.
    """

    def __init__(self, num_stages: int, max_num_reqs: int, device: torch.device) -> None:
        self._rows = StagedWriteTensor(
            (max_num_reqs, 2 + 3 * num_stages), dtype=torch.int32, device=device
        )
        scalars, *others = self._rows.gpu.split([2] + 3 * [num_stages], dim=1)
        self.counts = PromptCounts(*scalars.unbind(1), *others)
        self._staged: dict[int, list[int]] = {}

    @property
    def gpu(self) -> torch.Tensor:
        """``[max_num_reqs, 2 + 3 * stages]`` int32, all columns side by side."""
        return self._rows.gpu

    def add(self, index: int, plan: RequestPlan, prompt_keys: tuple[int, ...]) -> None:
        """Stage the row of a request about to be prefilled.

        Args:
            prompt_keys: prompt tokens that have keys in each stage once it was.
        """
        scalars = plan.num_prompt, plan.state_room
        self._staged[index] = [*scalars, *plan.kept, *plan.capacity, *prompt_keys]

    def apply_staged_writes(self) -> None:
        if not self._staged:
            return
        for index, row in self._staged.items():
            self._rows.stage_write(index, 0, row)
        self._staged = {}
        self._rows.apply_write()

    def row(self, index: int) -> torch.Tensor:
        """``[2 + 3 * stages]``, a copy made on the device's stream, for ``RowCopy``."""
        self.apply_staged_writes()
        return self._rows.gpu[index].clone()
