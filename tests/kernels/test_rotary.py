"""Rotary embedding on the way to the cache, against vLLM's."""

import pytest
import torch
from harness.world import close

from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

from lazyllm_vllm.kernels.rotary import rotate_and_write_reference, rotate_and_write_triton


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim", ((9, 3, 64), (32, 8, 128), (32, 32, 128), (6, 1, 96))
)
def test_rotate_and_write(heads, kv_heads, head_dim, device, dtype):
    random = torch.Generator().manual_seed(heads)
    num_rows, blocks, block_size = 13, 5, 16
    sizes = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    qkv = torch.randn(num_rows, sum(sizes), generator=random).to(device, dtype)
    # Another layer's pages lie between, and a slot's heads side by side.
    pages = torch.randn(blocks, 2, block_size, kv_heads, 2 * head_dim, generator=random)
    pages = pages.to(device, dtype)
    angle = 6.3 * torch.rand(99, head_dim // 2, generator=random)
    cos_sin = torch.cat([angle.cos(), angle.sin()], -1).to(device, dtype)
    # As the engine's buffers, longer than the rows.
    positions = torch.randint(99, (num_rows + 3,), generator=random).to(device)
    positions[num_rows:] = 10**9
    slots = torch.randperm(blocks * block_size, generator=random)[: num_rows + 3].to(device)
    slots[::4] = -1

    def split(x):
        return (part.view(num_rows, -1, head_dim) for part in x.split(sizes, -1))

    q, k, v = split(qkv)
    theirs = RotaryEmbedding.forward_static(
        positions[:num_rows], q.float(), k.float(), head_dim, head_dim, cos_sin.float(), True
    )
    for run in (rotate_and_write_triton, rotate_and_write_reference):
        rotated, written = qkv.clone(), pages.clone()
        mine = list(split(rotated))
        run(*mine, cos_sin, positions, slots, written[:, 1].transpose(1, 2))
        for a, b in zip(mine, theirs):
            close(a, b, dtype)
        assert torch.equal(mine[2], v)
        expected = pages.clone()
        for row, slot in enumerate(slots[:num_rows].tolist()):
            if slot >= 0:
                at = expected[slot // block_size, 1, slot % block_size]
                at[:, :head_dim], at[:, head_dim:] = mine[1][row], v[row]
        assert torch.equal(written, expected) and not torch.equal(written, pages)
