"""Physical slots of rows against their reference."""

import pytest
import torch
from harness.world import LONG, POISON, make_world

from lazyllm_vllm.kernels.place import place_rows_reference, place_rows_triton


@pytest.mark.parametrize("seed", (0, 1, LONG))
def test_place(seed, device):
    w = make_world(seed, 1, device=device)
    n, num_rows = len(w.prompts), 61
    rows = w.rows(num_rows + 5)
    rows.request[:num_rows] = torch.randint(-1, n, (num_rows,), generator=w.random).int()
    # Each row a slot of its own.
    rows.slot[:num_rows] = torch.arange(num_rows).remainder(w.width * w.block_size).int()
    rows.position[:] = torch.randint(0, 9999, (num_rows + 5,), generator=w.random)
    results = []
    for run in (place_rows_triton, place_rows_reference):
        mapping = torch.full((num_rows + 5,), POISON, dtype=torch.int64, device=device)
        slot_position = w.slot_position.clone().to(device)
        run(mapping, slot_position, rows, w.block_table, num_rows, w.block_size)
        results.append((mapping, slot_position))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    mapping, slot_position = results[0]
    assert (mapping[num_rows:] == POISON).all() and (mapping[:num_rows] == -1).any()
    for row in range(num_rows):
        request, slot = int(rows.request[row]), int(rows.slot[row])
        if request >= 0:
            block = int(w.block_table[request][slot // w.block_size])
            assert mapping[row] == block * w.block_size + slot % w.block_size
            assert slot_position[mapping[row]] == rows.position[row]
