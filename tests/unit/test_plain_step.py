"""A plain step tells attention and boundaries what a planned one does, of the same batch."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.boundary import Boundary
from lazyllm_vllm.runtime.buffers import StepBuffers
from lazyllm_vllm.runtime.plain_step import Chunks, PlainStep
from lazyllm_vllm.runtime.prefill_rows import Prefills
from lazyllm_vllm.runtime.request_table import RequestRow, RequestTable, RowCopy
from lazyllm_vllm.runtime.state_parts import StateParts
from lazyllm_vllm.runtime.step import Batch, Step
from lazyllm_vllm.runtime.step_kind import StepKind

BLOCK, NUM_BLOCKS, MOST = 4, 200, 8
STAGES, GROUPS = 3, [[0], [1, 3], [2]]  # the KV cache groups of each stage
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_pinned_memory(monkeypatch):
    """As vLLM's worker has it on a CPU."""
    monkeypatch.setattr("vllm.v1.worker.gpu.buffer_utils.UvaBuffer", UvaBuffer)


class World:
    """Requests of whose prompts nothing is dropped, the first of which decode.

    Args:
        decodes: for each, its prompt's length and the position it is at.
        chunks: for each, tokens that ran before, and that run.
    """

    def __init__(self, decodes: list[tuple[int, int]], chunks: list[tuple[int, int]]) -> None:
        self.first, prefills = ([*of_each] for of_each in zip(*chunks))
        config = LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.2}])
        self.schedule = Schedule.build(config, 6)
        self.lengths, self.num_decodes = prefills, len(decodes)
        prompts = [prompt for prompt, _ in decodes] + [sum(chunk) for chunk in chunks]
        self.positions = torch.tensor(
            [at for _, at in decodes] + [first + p for first, n in chunks for p in range(n)]
        )
        self.of_row = [*range(len(decodes))]
        self.of_row += [len(decodes) + i for i, n in enumerate(prefills) for _ in range(n)]
        ends = np.cumsum([1] * len(decodes) + prefills).tolist()
        self.starts = torch.tensor([0, *ends], dtype=torch.int32)
        self.last_rows = torch.tensor(ends) - 1
        self.num_keys = self.positions[self.last_rows].int() + 1
        self.tables = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(0))
        self.tables = self.tables.int().view(4, -1)[:, : MOST * 6].reshape(4, MOST, 6)
        self.slots = torch.stack([self._slots(group) for group in range(4)])

        table = RequestTable(STAGES, MOST, CPU)
        self.buffers = StepBuffers(self.schedule, table.counts, 128, 2, CPU)
        self.buffers.attach_kv_cache(NUM_BLOCKS * BLOCK, 4, None, None, None)
        for index, prompt in enumerate(prompts):
            plan = self.schedule.plan(prompt)
            table.gpu[index] = torch.tensor([prompt, 0, *plan.kept, *plan.capacity, *plan.kept])
        self.buffers.index[: len(prompts)] = torch.arange(len(prompts))
        tables = [[(group, self.tables[group]) for group in groups] for groups in GROUPS]
        parts = StateParts(SimpleNamespace(world_size=1), hidden_size=64)
        self.boundary = Boundary(self.schedule, self.buffers, tables, BLOCK, True, parts)

    def _slots(self, group: int) -> torch.Tensor:
        """Where vLLM has each row's key and value in a group, if a slot is a position."""
        places = zip(self.of_row, self.positions.tolist())
        blocks = [(int(self.tables[group, of][at // BLOCK]), at % BLOCK) for of, at in places]
        return torch.tensor([block * BLOCK + at for block, at in blocks])

    def batch(self, prefills: Prefills | None) -> Batch:
        req_ids = [str(index) for index in range(len(self.last_rows))]
        return Batch(
            req_ids, self.num_decodes, prefills, self.positions, self.last_rows, self.slots
        )

    def plain(self) -> Step:
        chunks = Chunks(self.first, self.lengths, self.starts, self.num_keys)
        return PlainStep(self.batch(None), chunks, self.schedule, self.buffers)

    def planned(self) -> Step:
        first, new = np.array(self.first, np.int32), np.array(self.lengths, np.int32)
        whole = Prefills.whole((first + new).tolist(), STAGES)
        batch = self.batch(replace(whole, first=first, caught_up=first))
        return Step(StepKind.RUN, batch, self.schedule, self.buffers, False)

    @staticmethod
    def _goes_on(step: Step, stage: int) -> dict:
        return {
            "first slots": step.segments[stage].first.tolist(),
            "keys": step.rows[stage].num_keys[step.prefills].tolist(),
            "first keys": step.key_starts[stage].tolist(),
            "most keys": step.longest_keys[stage],
            "all keys": step.num_keys[stage],
            "pairs": step.num_pairs[stage],
            "requests' rows": step.row_starts[stage].tolist(),
            "most rows of a request": step.longest_request[stage],
        }

    def run(self, step: Step) -> list[dict]:
        """What attention is told in each stage."""
        told, b = [], self.buffers
        b.slot_position.fill_(-1)
        self.boundary.begin(step)
        hidden = torch.arange(len(self.of_row)).float()[:, None]
        for stage in range(STAGES):
            if stage:
                hidden, residual = self.boundary.leave(step, stage, hidden, hidden)
                hidden, residual = self.boundary.enter(step, stage, hidden, residual)
                assert hidden is residual
            rows, mine = step.num_rows(stage), step.segments[stage]
            slots = step.slot_mappings(stage)[GROUPS[stage], :rows]
            told.append(
                {
                    "hidden": hidden.tolist(),
                    "slots": slots.tolist(),
                    "key positions": b.slot_position[slots].tolist() if stage else None,
                    "positions": step.positions(stage)[:rows].tolist(),
                    "last rows": step.query_row(stage)[: step.num_requests].tolist(),
                    "decodes' keys": step.rows[stage].num_keys[: step.num_decodes].tolist(),
                    "prefills' rows": [mine.of(n) for n in range(mine.count)],
                    "most rows": step.longest_prefill[stage],
                    "scores": step.prefills_score(stage),
                    "shifted": step.is_shifted,
                    "goes on": step.continues(stage) and self._goes_on(step, stage),
                }
            )
        return told


@pytest.mark.parametrize(
    "decodes, chunks",
    [
        ([], [(0, 17)]),
        ([], [(0, 5), (0, 1), (0, 20)]),
        ([(9, 20), (3, 3)], [(0, 17)]),
        ([(1, 6)], [(0, 1), (0, 2), (0, 3)]),
        ([], [(8, 9)]),
        ([(9, 20), (3, 3)], [(4, 1), (0, 3), (16, 5)]),
    ],
)
def test_attention_is_told_the_same(decodes, chunks):
    world = World(decodes, chunks)
    plain, planned = world.run(world.plain()), world.run(world.planned())
    assert plain == planned
    for stage, told in enumerate(plain):
        assert told["slots"] == world.slots[GROUPS[stage]].tolist()
        assert told["decodes' keys"] == [at + 1 for _, at in decodes]
        if stage:
            assert told["key positions"] == [world.positions.tolist()] * len(GROUPS[stage])


def test_a_row_is_written_when_somebody_looks():
    """And a request that took another's place has its own."""
    config = LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}], min_prompt_tokens=100)
    schedule = Schedule.build(config, 4)
    table = RequestTable(2, 3, CPU)
    for index, prompt in ((1, 40), (2, 50), (1, 60)):
        plan = schedule.plan(prompt)
        table.add(index, plan, plan.kept)
    assert not table.gpu.any()
    for index, prompt in ((0, 0), (1, 60), (2, 50)):
        row = RowCopy(table.row(index)).read()
        assert row == RequestRow(prompt, 0, *[[prompt, prompt]] * 3)
        if prompt:
            known = RequestRow.unpruned(schedule.plan(prompt))
            assert RowCopy(known).read() == row and RowCopy(known).is_here


def test_the_batch_is_written_when_it_changes():
    config = LazyLLMConfig(prune=[{"layer": 2, "keep": 0.5}])
    counts = RequestTable(2, MOST, CPU).counts
    buffers = StepBuffers(Schedule.build(config, 4), counts, 16, 2, CPU)

    def show(*index: int, padded: int) -> list[int]:
        buffers.set_index([*index], torch.tensor(index), padded)
        return buffers.index[:padded].tolist()

    assert show(4, 2, 7, padded=4) == [4, 2, 7, -1]
    buffers.index[0] = 5
    assert show(4, 2, 7, padded=4) == [5, 2, 7, -1], "the same again is not written"
    assert show(4, 2, padded=4) == [4, 2, -1, -1]
    assert show(4, 2, padded=2) == [4, 2]
    buffers.clear_index(3)
    assert buffers.index[:3].tolist() == [-1] * 3
    assert show(4, 2, padded=2) == [4, 2]
    for quota in (3, 3, 0, 8):
        buffers.set_quota(quota)
        assert int(buffers.quota) == quota
