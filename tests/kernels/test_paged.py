"""The keys of many requests at once."""

from dataclasses import replace

import pytest
import torch
from harness.world import make_world

from lazyllm_vllm.kernels.paged import FP8


@pytest.mark.parametrize("stage", (0, 2))
@pytest.mark.parametrize("fp8", (False, True))
@pytest.mark.parametrize("batch", (range(0, 4), range(1, 3), range(2, 2)))
def test_gather_all(stage, fp8, batch, device, dtype):
    """What each request's own keys are, one after the other; request 2 has none."""
    w = make_world(1, stage, device=device, dtype=dtype)
    present = [len(p) for p in w.present] if stage else w.prompts
    lengths = [c + d for c, d in zip(present, w.decoded)]
    lengths[2] = 0
    keys = w.keys(lengths)
    if fp8:
        keys = replace(keys, kv_cache=keys.kv_cache.to(FP8), k_scale=0.5, v_scale=3.0)
    k, v, position, starts = keys.gather_all(batch, sum(lengths[i] for i in batch))
    expected_starts = [sum(lengths[batch.start : i]) for i in (*batch, batch.stop)]
    assert starts.tolist() == expected_starts and starts.dtype == torch.int32
    of_all = list(zip(*((*keys.gather(i), keys.positions(i)) for i in batch)))
    for mine, expected in zip((k, v, position), of_all):
        expected = torch.cat(expected)
        assert mine.dtype == expected.dtype and torch.equal(mine, expected)
    assert len(k) == len(v) == len(position) == expected_starts[-1]
    for i, first in zip(batch, expected_starts):  # and that written out
        prompt = w.present[i].tolist() if stage else range(w.prompts[i])
        decoded = range(w.prompts[i], w.prompts[i] + w.decoded[i])
        positions = [*prompt, *decoded][: lengths[i]]
        assert position[first : first + lengths[i]].tolist() == positions
        for j in (0, lengths[i] // 2, lengths[i] - 1) if lengths[i] else ():
            slot = keys.kv_cache[w.block_table[i, j // w.block_size], :, j % w.block_size]
            own = torch.cat([k[first + j] / keys.k_scale, v[first + j] / keys.v_scale], -1)
            torch.testing.assert_close(own.float(), slot.float())
