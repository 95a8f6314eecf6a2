"""What every boundary decided, for tests and debugging: ``LAZYLLM_TRACE=1``.

Needs ``enforce_eager``, and slows every step down: it waits for the device.
"""

import os
from collections import defaultdict

import torch

from lazyllm_vllm.kernels.attention import physical_slots


class Trace:
    """Records by request id, and checks that no token is computed twice.

    Attributes:
        prefills: for each prefill (several after preemption) ``num_prompt`` and the sorted
            positions kept, by stage.
        decodes: for each token decoded, by stage, sorted ``selected`` and ``revived`` positions.
    """

    def __init__(self) -> None:
        self.prefills: dict[str, list[dict]] = defaultdict(list)
        self.decodes: dict[str, list[dict[int, dict[str, list[int]]]]] = defaultdict(list)
        self.keys: dict[str, dict[int, list[int]]] = {}

    @staticmethod
    def enabled() -> bool:
        return os.environ.get("LAZYLLM_TRACE") == "1"

    def begin(self, step) -> None:
        for i, req_id in enumerate(step.req_ids):
            if i < step.num_decodes:
                self.decodes[req_id].append({})
            else:
                num_prompt = int(step.prefill_lens[0, i - step.num_decodes])
                self.prefills[req_id].append({"num_prompt": num_prompt})
                self.keys[req_id] = {}

    def boundary(self, step, stage: int) -> None:
        b, rows = step.buffers, step.buffers.rows[stage]
        request = rows.request[: step.num_rows(stage)].cpu()
        position = rows.position[: step.num_rows(stage)].cpu()
        num_decode_rows = step.num_decode_rows(stage)
        for i, req_id in enumerate(step.req_ids):
            mine = (request == i).nonzero()[:, 0]
            if i >= step.num_decodes:
                kept = position[mine].tolist()
                assert kept == sorted(set(kept)), "kept tokens run in order of position"
                self.prefills[req_id][-1][stage] = kept
                self.keys[req_id][stage] = list(kept)
                continue
            revived = position[mine[(mine >= step.num_decodes) & (mine < num_decode_rows)]].tolist()
            had = self.keys.get(req_id, {}).get(stage, [])
            assert not set(revived) & set(had), "a token is computed twice in a stage"
            had += revived
            self.decodes[req_id][-1][stage] = {
                "selected": self._selected(step, stage, i),
                "revived": sorted(revived),
            }
            self._check_levels(b, step, stage, i, had)

    def _home(self, step, i: int) -> torch.Tensor:
        p = torch.arange(int(step.buffers.num_prompt[i]), device=step.buffers.level.device)
        return physical_slots(step.position_table[i], p, step.buffers.block_size)

    def _selected(self, step, stage: int, i: int) -> list[int]:
        if not step.decodes_select or not int(step.buffers.is_pruned[i]):
            return []
        depth = step.buffers.selected[self._home(step, i)]
        return (depth >= stage).nonzero()[:, 0].tolist()

    def _check_levels(self, buffers, step, stage: int, i: int, had: list[int]) -> None:
        if int(buffers.is_pruned[i]):
            level = buffers.level[self._home(step, i)]
            reached = (level > stage).nonzero()[:, 0].tolist()
            assert reached == sorted(had), "a token's level disagrees with the keys it has"

    def report(self) -> dict:
        """Everything recorded so far, plain lists and dicts."""
        return {"prefills": dict(self.prefills), "decodes": dict(self.decodes)}
