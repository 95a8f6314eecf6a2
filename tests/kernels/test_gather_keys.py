"""The keys of many requests at once, side by side."""

from dataclasses import replace

import pytest
import torch
from harness.world import make_world

from lazyllm_vllm.kernels import gather_keys as module
from lazyllm_vllm.kernels.paged import FP8


@pytest.mark.parametrize("stage", (0, 2))
@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("heads", (None, range(1, 2)))
@pytest.mark.parametrize("batch", (range(0, 4), range(1, 3), range(2, 2)))
@pytest.mark.parametrize("way", ("as the engine does", "kernel"))
def test_gather_keys(stage, fp8, heads, batch, way, device, dtype, monkeypatch):
    """What each request's own keys are, one after the other; request 2 has none, request 3 one more
    than is asked for."""
    w = make_world(1, stage, device=device, dtype=dtype)
    present = [len(p) for p in w.present] if stage else w.prompts
    lengths = [c + d for c, d in zip(present, w.decoded)]
    keys = w.keys(lengths)
    lengths[2], lengths[3] = 0, lengths[3] - 1
    if fp8:
        keys = replace(keys, kv_cache=keys.kv_cache.to(FP8), k_scale=0.5, v_scale=3.0)
    if way == "kernel":
        monkeypatch.setattr(module, "gather_keys_reference", module.gather_keys_triton)
    starts = torch.tensor([sum(lengths[batch.start : i]) for i in (*batch, batch.stop)])
    starts, total = starts.to(device, torch.int32), sum(lengths[i] for i in batch)
    longest = max((lengths[i] for i in batch), default=0)
    k, v, position = module.gather_keys(keys, batch, starts, total, longest, dtype, heads)
    assert len(k) == len(v) == len(position) == total and k.dtype == v.dtype == dtype
    some = heads or range(w.kv_heads)
    assert k.shape[1:] == v.shape[1:] == (len(some), w.head_dim)
    for i, first in zip(batch, starts.tolist()):
        prompt = w.present[i].tolist() if stage else range(w.prompts[i])
        decoded = range(w.prompts[i], w.prompts[i] + w.decoded[i])
        positions = [*prompt, *decoded][: lengths[i]]
        assert position[first : first + lengths[i]].tolist() == positions
        for j in range(lengths[i]):
            block = w.block_table[i, j // w.block_size]
            slot = keys.kv_cache[block, some.start : some.stop, j % w.block_size].float()
            of_k, of_v = slot.split(w.head_dim, -1)
            assert torch.equal(k[first + j], (of_k * keys.k_scale).to(dtype)), (i, j)
            assert torch.equal(v[first + j], (of_v * keys.v_scale).to(dtype)), (i, j)
