"""What engines run in tests for vLLM's kernels for block tables is what these do."""

import inspect
import random

import pytest
import torch
from harness import block_tables

from vllm.v1.worker.cpu.buffer_utils import UvaBuffer
from vllm.v1.worker.gpu import block_table, buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables

BLOCK_SIZES, WIDTHS, MAX_TOKENS = [16, 32, 16], [12, 7, 20], 200
HAS_WINDOWS = "sliding_window_reach" in inspect.signature(BlockTables).parameters


def _tables(seed: int) -> tuple[BlockTables, random.Random]:
    """Six requests with blocks for 60 to 190 tokens, in groups of which one maps no slots and, in
    vLLM 0.33, one sees a window of 40 tokens."""
    rng = random.Random(seed)
    own = {"sliding_window_reach": [40, 0, 0]} if HAS_WINDOWS else {}
    enabled = [True, True, False]
    device = torch.device("cpu")
    tables = BlockTables(
        BLOCK_SIZES, 6, MAX_TOKENS, WIDTHS, device, slot_mapping_enabled=enabled, **own
    )
    for request in range(6):
        tokens = rng.randrange(60, 190)
        blocks = tuple([rng.randrange(1, 900) for _ in range(-(-tokens // n))] for n in BLOCK_SIZES)
        tables.append_block_ids(request, blocks, overwrite=True)
    tables.apply_staged_writes()
    return tables, rng


def _run(seed: int) -> list[torch.Tensor]:
    """Tables and slots of a step: chunks of four requests out of order, two rows of padding, over
    what an earlier step left."""
    tables, rng = _tables(seed)
    for row in (*tables.input_block_tables, tables.slot_mappings):
        row.fill_(7)
    index = torch.tensor(rng.sample(range(6), 4), dtype=torch.int32)
    first = [rng.randrange(45) for _ in range(4)]
    chunks = [range(n, n + rng.randrange(1, 15)) for n in first]
    starts = torch.tensor([0, *map(len, chunks)], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    positions = torch.tensor([p for chunk in chunks for p in chunk])
    computed = torch.full((6,), 59, dtype=torch.int32)
    window = {"num_computed_tokens": computed} if HAS_WINDOWS else {}
    rows = tables.gather_block_tables(index, 6, **window)
    whole = torch.tensor([-1, *index[1:]], dtype=torch.int32)  # the first is a dummy
    slots = [
        tables.compute_slot_mappings(of, starts, positions, MAX_TOKENS).clone()
        for of in (index, whole)
    ]
    return [*rows, *slots]


@pytest.mark.parametrize("seed", range(4))
def test_they_are_vllms_kernels(seed, monkeypatch):
    monkeypatch.setattr(buffer_utils, "UvaBuffer", UvaBuffer)
    expected = _run(seed)
    for name in ("_gather_block_tables_kernel", "_compute_slot_mappings_kernel"):
        monkeypatch.setattr(block_table, name, getattr(block_table, name))  # put back afterwards
    block_tables.install()
    for mine, theirs in zip(_run(seed), expected, strict=True):
        assert torch.equal(mine, theirs)
    assert (expected[-1] == -1).any() and (expected[0] == 0).any()
