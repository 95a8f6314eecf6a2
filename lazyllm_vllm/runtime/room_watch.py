"""Which requests can revive nothing more, learnt late so as not to wait for the device.

A request's capacity in the later stages only fills up. Once it is full its steps need no selection,
so a batch of such requests runs as fast as one that was never pruned. What is learnt in a step does
not depend on how fast the device is: with tensor parallelism all ranks must learn the same.
"""

import torch

from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.runtime.request_table import RequestRow, RequestTable

INTERVAL = 16  # steps between looks
LATER = 4  # steps from a look to when its result is read, which is there by then


class RoomWatch:
    def __init__(self, table: RequestTable) -> None:
        self.table = table
        self._copy = torch.empty(table.gpu.shape, dtype=torch.int32, pin_memory=table.gpu.is_cuda)
        self._event = torch.cuda.Event() if table.gpu.is_cuda else None
        self._asked: dict[str, int] = {}
        self._steps = 0

    def step(self, index_of: dict[str, int], plans: dict[str, RequestPlan]) -> list[str]:
        """Called every step; returns requests seen to be full since the last call.

        Args:
            index_of: row in the request table of the requests to watch.
            plans: of every request.
        """
        full = []
        self._steps += 1
        if self._asked and self._steps >= LATER:
            if self._event is not None:
                self._event.synchronize()
            rows = {
                name: RequestRow.of(self._copy[at].tolist()) for name, at in self._asked.items()
            }
            # One that left, or was preempted and came back longer, is not the one that was seen.
            full = [
                name
                for name, row in rows.items()
                if name in index_of and plans[name].num_prompt == row.num_prompt and row.is_full
            ]
            self._asked = {}
        if not self._asked and index_of and self._steps >= INTERVAL:
            self._steps = 0
            self._asked = dict(index_of)
            self._copy.copy_(self.table.gpu, non_blocking=True)
            if self._event is not None:
                self._event.record()
        return full
