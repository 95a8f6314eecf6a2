"""How many tokens of each prompt hold a share of all its scores.

    count = the least k for which the k best candidates' scores add up to mass * those of all

by the pooled scores that tokens are ranked by. Sums are of whole numbers, so that they come out the
same in any order: a score s counts as floor(s * 2^30). Tokens that are always kept count as tokens
and hold nothing.
"""

import torch

from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.kernels.top_k import ALWAYS_KEPT, NO_CANDIDATE

UNIT = 2.0**30


def keep_by_mass(
    s: Selection, stage: int, batch: range, longest: int, mass: float, least: int
) -> torch.Tensor:
    """Count for the boundary before ``stage``, whose ranks are there, and let those prefills of
    ``batch`` that are pruned now (``s.active``) keep as many: at least ``least``, at most what
    ``s.counts.kept`` allows and what the stage before has. Written to ``s.counts``. What could be
    kept and is not is room to revive in, but of a request that has no reserve, which revives none.

    Args:
        longest: tokens of the longest of these prompts.

    Returns:
        ``[prefills]`` int32, tokens that each keeps in the stage.
    """
    mine = slice(batch.start, batch.stop)
    position = torch.arange(longest, device=s.index.device)
    is_active = s.active[stage, mine] > 0
    there = (position < s.num_prompt[mine, None]) & is_active[:, None]
    request = torch.arange(batch.start, batch.stop, device=position.device)[:, None]
    at = s.state.at(request, position.where(there, 0))
    rank = s.state.rank[at].where(there, NO_CANDIDATE).sort(dim=1, descending=True).values
    holds = (rank > 0) & (rank < ALWAYS_KEPT)
    units = (rank.view(torch.float32).where(holds, 0.0).double() * UNIT).long()
    held = units.cumsum(1)
    enough = (held[:, -1:].double() * mass).ceil()
    count = (held < enough).sum(1) + 1

    index = s.index[mine].clamp(min=0).long()
    kept = s.counts.kept[index, stage]
    at_least = s.num_prompt[mine].clamp(max=least)
    count = count.maximum(at_least).minimum(kept).minimum(s.counts.kept[index, stage - 1])
    count = count.int().where(is_active, kept)
    reserves = (s.counts.capacity[index] > s.counts.kept[index]).any(1)
    capacity = s.counts.capacity[index, stage].where(reserves, count)
    for column, value in (
        (s.counts.kept, count),
        (s.counts.prompt_keys, count),
        (s.counts.capacity, capacity),
    ):
        column[index, stage] = value.where(is_active, column[index, stage])
    s.choice.count[stage, mine] = count
    return count
