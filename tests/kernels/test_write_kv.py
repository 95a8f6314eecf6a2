"""What a cache holds of keys and values, of the model's dtype and in FP8."""

import pytest
import torch

from lazyllm_vllm.kernels.paged import FP8, StageKeys
from lazyllm_vllm.kernels.write_kv import write_kv


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("fp8", (False, True))
def test_write_kv(dtype, fp8):
    random = torch.Generator().manual_seed(0)
    k, v = 30 * torch.randn(2, 9, 2, 16, generator=random).to(dtype)
    k[1, 0, :4] = torch.tensor([1e4, -1e4, 224.5, 0.0])  # what FP8 has no number for, and the last
    cache = torch.full((4, 2, 16, 32), 7.0).to(FP8 if fp8 else dtype)
    scales = (0.5, 3.0) if fp8 else (1.0, 1.0)
    keys = StageKeys(
        cache, torch.tensor([[2, 1]]).int(), torch.tensor([20]).int(), torch.empty(0), 0, *scales
    )
    # Slots 0, 3, 6, ... of the request in blocks 2 and 1; the engine's buffer is longer.
    slots = torch.tensor([32, 35, -1, 41, 44, 47, 18, -1, 16, 33, 34])
    write_kv(k, v, slots, keys)
    written = {0: 0, 3: 1, 9: 3, 12: 4, 15: 5, 18: 6, 16: 8}
    for given, read, scale in zip((k, v), keys.gather(0), scales):
        for slot in range(20):
            expected = torch.full((2, 16), 7.0 * scale)
            if slot in written:
                expected = given[written[slot]].float()
                if fp8:  # four significant bits, and none beyond 448 of the scale
                    expected = expected.clamp(-448 * scale, 448 * scale)
            error = (read[slot].float() - expected).abs()
            bound = expected.abs() / 16 + scale * 2.0**-10 if fp8 else 0.0
            assert (error <= bound).all()
    assert (cache[0].float() == 7).all() and (cache[3].float() == 7).all()
