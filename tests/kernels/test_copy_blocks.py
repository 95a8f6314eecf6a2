"""Blocks copied whole, in any order, and nothing else touched."""

import torch

from lazyllm_vllm.kernels.copy_blocks import copy_blocks_reference, copy_blocks_triton


def test_copy_blocks(device):
    pages, words, slots = 3, 5000, 12  # none a power of two
    # As vLLM lays a buffer out: pages far apart, blocks side by side, something behind each.
    buffer = torch.arange(pages * 9 * (words + 8), dtype=torch.int32, device=device)
    position = torch.arange(9 * slots, dtype=torch.int32, device=device).view(9, slots)
    pairs = torch.tensor([[7, 0, 3, 0], [1, 8, 2, 5]], dtype=torch.int32, device=device)
    results = []
    for copy in (copy_blocks_triton, copy_blocks_reference):
        own, of_own = buffer.clone(), position.clone()
        strides = words + 8, 9 * (words + 8), 1
        copy(own.as_strided((9, pages, words), strides), of_own, pairs)
        results.append((own, of_own))
    (own, of_own), (expected, of_expected) = results
    assert torch.equal(own, expected) and torch.equal(of_own, of_expected)
    assert of_own[[1, 8, 2, 5]].tolist() == position[[7, 0, 3, 0]].tolist()
    changed = (own != buffer).view(pages, 9, words + 8).any(-1)
    assert changed.any(0).nonzero()[:, 0].tolist() == [1, 2, 5, 8]
    assert not (own != buffer).view(-1, words + 8)[:, words:].any(), "behind a block"
