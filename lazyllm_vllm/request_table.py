"""What the GPU knows of each request: one row of int32, owned here.

Columns, S stages: ``num_prompt | kept[S] | room[S] | prompt_keys[S]``

* num_prompt: tokens of the prompt, as prefilled (prompt and earlier output, after preemption);
* kept: tokens of it that each stage keeps;
* room: most of it that may ever have keys in the stage;
* prompt_keys: how many have keys there now. Prefill sets it, each revival adds to it.

Keys in stage s are ``prompt_keys[s]`` and one for each token after the prompt, so the slot of the
token at position p >= num_prompt is ``prompt_keys[s] + p - num_prompt``.
"""

import torch

from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

from lazyllm_vllm.schedule import Schedule


class RequestTable:
    """Rows are indexed as vLLM's request states are."""

    def __init__(self, schedule: Schedule, max_num_reqs: int, device: torch.device) -> None:
        self.schedule = schedule
        self._rows = StagedWriteTensor(
            (max_num_reqs, 1 + 3 * schedule.num_stages), dtype=torch.int32, device=device
        )

    @property
    def gpu(self) -> torch.Tensor:
        """``[max_num_reqs, 1 + 3 * stages]`` int32."""
        return self._rows.gpu

    def add(self, index: int, num_prompt: int) -> None:
        """Stage the row of a request about to be prefilled."""
        schedule = self.schedule
        kept = schedule.kept(num_prompt)
        room = (schedule.prompt_room(s, num_prompt) for s in range(schedule.num_stages))
        self._rows.stage_write(index, 0, [num_prompt, *kept, *room, *kept])

    def apply_staged_writes(self) -> None:
        self._rows.apply_write()

    def row(self, index: int) -> torch.Tensor:
        """``[1 + 3 * stages]``, a copy made on the device's stream."""
        return self._rows.gpu[index].clone()


def kept_and_prompt_keys(row: list[int]) -> tuple[list[int], list[int]]:
    """``kept`` and ``prompt_keys``, by stage, of a row brought to the CPU."""
    stages = (len(row) - 1) // 3
    return row[1 : 1 + stages], row[1 + 2 * stages :]


def is_full(row: list[int]) -> bool:
    """Whether no stage has room for another revived token."""
    stages = (len(row) - 1) // 3
    room, prompt_keys = row[1 + stages : 1 + 2 * stages], row[1 + 2 * stages :]
    return all(keys >= most for keys, most in zip(prompt_keys, room))
