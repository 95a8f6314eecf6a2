"""Hidden states in parts, one a rank, without ranks."""

from types import SimpleNamespace

import pytest
import torch

from lazyllm_vllm.plan.grouping import part_width
from lazyllm_vllm.runtime import state_parts
from lazyllm_vllm.runtime.state_parts import StateParts


@pytest.mark.parametrize(
    ("hidden_size", "ranks", "width"),
    [(4096, 1, 4096), (4096, 2, 2048), (8192, 8, 1024), (2880, 4, 720), (2880, 8, 2880)],
)
def test_widths(hidden_size, ranks, width):
    """360 is no multiple of 16."""
    assert part_width(hidden_size, ranks) == width


def _of_ranks(hidden_size: int, ranks: int) -> list[StateParts]:
    groups = [SimpleNamespace(world_size=ranks, rank_in_group=rank) for rank in range(ranks)]
    return [StateParts(group, hidden_size) for group in groups]


@pytest.mark.parametrize("rows", (0, 1, 5))
@pytest.mark.parametrize("ranks", (1, 2, 4))
def test_parts_make_the_whole_again(monkeypatch, ranks, rows):
    states = torch.randn(rows, 64)
    parts = _of_ranks(64, ranks)
    mine = [part.mine(states) for part in parts]
    assert sum(part.shape[1] for part in mine) == 64 and all(x.is_contiguous() for x in mine)

    def all_gather(group, out, part):
        assert part is mine[group.rank_in_group] and len(part)
        torch.cat(mine, out=out)

    monkeypatch.setattr(state_parts, "all_gather", all_gather)
    for part, own in zip(parts, mine):
        assert torch.equal(part.whole(own), states)


def test_what_does_not_divide_is_whole_on_each():
    """And nobody asks the others."""
    states = torch.randn(3, 40)
    for part in _of_ranks(40, 2):
        assert part.width == 40 and part.whole(part.mine(states)) is states
    assert part.mine(None) is None
