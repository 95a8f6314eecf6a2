"""What every boundary decided, for tests and debugging: ``LAZYLLM_TRACE=1``.

Needs ``enforce_eager``, and slows every step down: it waits for the device.
"""

import hashlib
import os
from collections import defaultdict

import torch
import torch.distributed as dist


def is_of(req_id: str, request: str) -> bool:
    """Whether a request's id is the one that it was given, with vLLM's own ending or without."""
    return f"{req_id}-".startswith(f"{request}-")


class Trace:
    """Records by request id, and checks that no token is computed twice, and that all ranks of
    tensor parallelism choose the same.

    Attributes:
        prefills: for each prefill (several after preemption) ``num_prompt``, the ``chunks`` that it
            ran in, first and end of each, and the sorted positions kept, by stage. Of one that goes
            on from a snapshot, by stage the positions that ran; and ``resident``, by stage the
            sorted positions of the pruned prompt that have keys.
        places: of each pruned prompt's last prefill, by stage from 1 on: of each position its place
            in the order in which tokens were chosen, 1 the best; 0: it was no candidate.
        decodes: for each token decoded, by stage, sorted ``selected`` and ``revived`` positions.
    """

    def __init__(self, group) -> None:
        """``group``: vLLM's ``GroupCoordinator`` of the ranks."""
        self.group = group
        self.prefills: dict[str, list[dict]] = defaultdict(list)
        self.decodes: dict[str, list[dict[int, dict[str, list[int]]]]] = defaultdict(list)
        self.places: dict[str, dict[int, list[int]]] = defaultdict(dict)
        self.keys: dict[str, dict[int, list[int]]] = {}

    @staticmethod
    def enabled() -> bool:
        return os.environ.get("LAZYLLM_TRACE") == "1"

    def begin(self, step) -> None:
        """Called at the start of a step (``runtime.step.Step``)."""
        for i, req_id in enumerate(step.batch.req_ids):
            if not req_id:  # padding
                continue
            if i < step.num_decodes:
                self.decodes[req_id].append({})
            else:
                # A turn's last tokens are a prefill of their own; see ``hooks.turns``.
                is_rest = step.batch.req_ids[i - 1] == req_id and i > step.num_decodes
                self._chunk(req_id, step.batch.prefills, i - step.num_decodes, is_rest)

    def _chunk(self, req_id: str, prefills, at: int, is_rest: bool) -> None:
        p, seen = prefills, self.prefills[req_id]
        if p.ran[0, at]:  # its last token comes again, with more rows of the later stages
            return
        num_prompt, first, end = (int(x[at]) for x in (p.num_prompt, p.first, p.end))
        if is_rest:
            seen[-1]["chunks"][-1] = (seen[-1]["chunks"][-1][0], end)
            return
        goes_on = seen and seen[-1]["chunks"][-1][1] == first and p.caught_up[at]  # not preempted
        if not (goes_on and first < seen[-1]["num_prompt"]):
            seen.append({"num_prompt": num_prompt, "chunks": []})
            self.keys[req_id] = {}
        seen[-1]["chunks"].append((first, end))

    def boundary(self, step, stage: int, buffers) -> None:
        """Called when the rows of a stage are known (``runtime.buffers.StepBuffers``).

        Raises:
            RuntimeError: not all ranks chose the same.
        """
        self._check_ranks(step, stage, buffers)
        rows, s, req_ids = step.rows[stage], buffers.selection, step.batch.req_ids
        request = rows.request[: step.num_rows(stage)].cpu()
        position = rows.position[: step.num_rows(stage)].cpu()
        row = torch.arange(len(request))
        is_revived = (row >= step.num_decodes) & (row < step.num_decode_rows(stage))
        decodes = [] if step.is_part else [i for i in step.decodes if req_ids[i]]
        revived = {req_ids[i]: position[(request == i) & is_revived].tolist() for i in decodes}

        def resident(i: int) -> list[int]:
            """Before this step."""
            here = set(self._resident(s, i, stage)) - set(revived.get(req_ids[i], ()))
            return sorted(here)

        for i in step.prefills:
            if not (req_id := req_ids[i]):
                continue
            kept = self.prefills[req_id][-1].setdefault(stage, [])
            kept += position[request == i].tolist()
            assert kept == sorted(set(kept)), "kept tokens run in order of position"
            self.keys[req_id][stage] = list(kept)
            prefills, at = step.batch.prefills, i - step.first_prefill
            if prefills.is_pruned[at]:
                if prefills.crosses[stage, at]:
                    self.places[req_id][stage] = self._places(s, i)
                    if prefills.before[stage, at]:
                        self._go_on(req_id, stage, resident(i))
            elif int(s.is_pruned[i]):
                self._go_on(req_id, stage, resident(i))
        for i in decodes:
            req_id = req_ids[i]
            if int(s.is_pruned[i]) and stage not in self.keys.get(req_id, {}):
                # It goes on, and no row of it ran in the stage before.
                self._go_on(req_id, stage, resident(i))
            had = self.keys.get(req_id, {}).get(stage, [])
            assert not set(revived[req_id]) & set(had), "a token is computed twice in a stage"
            had += revived[req_id]
            selected = []
            if int(s.is_pruned[i]):
                at = s.state.prompt_at(i, s.num_prompt)
                has_keys = self._resident(s, i, stage)
                assert has_keys == sorted(had), "a token's level disagrees with the keys it has"
                if step.decodes_select:
                    selected = (s.state.selected[at] >= stage).nonzero()[:, 0].tolist()
            self.decodes[req_id][-1][stage] = {
                "selected": selected,
                "revived": sorted(revived[req_id]),
            }

    @staticmethod
    def _places(selection, i: int) -> list[int]:
        """By position of a prompt, where it stands in the order in which tokens are chosen."""
        state = selection.state
        rank = state.rank[state.prompt_at(i, selection.num_prompt)].cpu()
        place = torch.empty_like(rank)
        place[rank.argsort(descending=True, stable=True)] = torch.arange(
            1, len(rank) + 1, dtype=rank.dtype
        )
        return place.where(rank >= 0, 0).tolist()

    def _go_on(self, req_id: str, stage: int, resident: list[int]) -> None:
        """Note what a request that goes on has in a stage."""
        self.keys.setdefault(req_id, {})[stage] = list(resident)
        if not self.prefills[req_id]:  # all but its last token had run
            self.prefills[req_id].append({"num_prompt": None, "chunks": []})
        self.prefills[req_id][-1].setdefault("resident", {})[stage] = resident

    @staticmethod
    def _resident(s, request: int, stage: int) -> list[int]:
        """Positions of a request's pruned prompt that have keys in a stage."""
        at = s.state.prompt_at(request, s.num_prompt)
        return (s.state.level[at] > stage).nonzero()[:, 0].tolist()

    def _check_ranks(self, step, stage: int, buffers) -> None:
        if self.group.world_size == 1:
            return
        rows, s = step.rows[stage], buffers.selection
        chosen = [rows.request[: step.num_rows(stage)], rows.position[: step.num_rows(stage)]]
        if step.decodes_select:
            of_pruned = (i for i in step.decodes if int(s.is_pruned[i]))
            chosen += [s.state.selected[s.state.prompt_at(i, s.num_prompt)] for i in of_pruned]
        digest = hashlib.sha256(b"".join(each.cpu().numpy().tobytes() for each in chosen))
        mine = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
        of_all = [torch.empty_like(mine) for _ in range(self.group.world_size)]
        dist.all_gather(of_all, mine, group=self.group.cpu_group)
        others = [rank for rank, each in enumerate(of_all) if not torch.equal(each, of_all[0])]
        if others:
            raise RuntimeError(
                f"lazyllm: at the boundary before stage {stage}, ranks {others} chose other tokens "
                f"than rank 0; requests {step.batch.req_ids}"
            )

    def report(self, request: str | None = None) -> dict:
        """What was recorded so far, plain lists and dicts by request id.

        Args:
            request: only of the request of this id, to which vLLM adds an ending of its own.
        """

        def asked(of_all: dict) -> dict:
            named = (r for r in of_all if request is None or is_of(r, request))
            return {req_id: of_all[req_id] for req_id in named}

        return {what: asked(getattr(self, what)) for what in ("prefills", "places", "decodes")}
