"""Tensor parallelism: each rank has its own heads, and so its own scores of the same tokens.

At a boundary, before tokens are ranked, the ranks' scores become one: the highest of them, or their
mean. Every rank has the same number of query heads, and each head is on one rank (keys of fewer
heads than ranks are on several, but only queries count), so that the mean over ranks is the mean
over heads. Then all ranks rank the same numbers, and what follows is the same on all of them.
"""

import torch
import torch.distributed as dist

from vllm.distributed.parallel_state import GroupCoordinator

from lazyllm_vllm.kernels.dense_scores import gather_scores, scatter_scores
from lazyllm_vllm.kernels.selection import Selection
from lazyllm_vllm.runtime.collectives import all_reduce


class ScoreReduction:
    """Attributes:
    dense: ``[most tokens]`` fp32, scores of the requests that choose at a boundary, side by side.
    """

    def __init__(
        self,
        group: GroupCoordinator,
        is_peak: bool,
        longest: int,
        most_tokens: int,
        device: torch.device,
    ) -> None:
        """Args:
        group: of all ranks.
        is_peak: whether the highest score counts; else the mean.
        longest: most tokens of a prompt.
        most_tokens: of all prompts together that there can be at once.
        """
        self.group = group
        self.op = dist.ReduceOp.MAX if is_peak else dist.ReduceOp.SUM
        self.factor = 1.0 if is_peak else 1 / group.world_size
        self.longest = longest
        self.dense = torch.zeros(most_tokens, device=device)

    def run(self, s: Selection, stage: int, batch: range, num_tokens: int | None) -> None:
        """Reduce the scores of the requests of ``batch`` that choose at the boundary before
        ``stage``. All ranks call it, with the same.

        Args:
            num_tokens: of their prompts together, or more; None: as many as there can be.
        """
        if num_tokens is None:
            num_tokens = min(len(batch) * self.longest, len(self.dense))
        assert num_tokens <= len(self.dense)
        dense = self.dense[:num_tokens]
        gather_scores(s, stage, batch, dense)
        all_reduce(self.group, dense, self.op)
        scatter_scores(s, stage, batch, dense, self.factor)
