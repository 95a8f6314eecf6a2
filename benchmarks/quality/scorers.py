"""What tokens are chosen by, in the methods that LazyLLM is compared with."""

from functools import partial

import torch

from benchmarks.quality.rule_scorer import RuleScorer
from benchmarks.quality.rules import RULES
from lazyllm_vllm.runtime import scorers


class RandomScorer(scorers.AttentionScorer):
    """Anything."""

    every_layer = False

    def score_prefills(self, s, queries, keys, batch, is_first_layer) -> None:
        self._score(s, batch, s.is_pruned)

    def score_decodes(self, s, queries, keys, batch) -> None:
        self._score(s, batch, s.active[0])

    def _score(self, s, batch, active) -> None:
        for i in batch:
            if active[i]:
                at = s.state.prompt_at(i, s.num_prompt)
                s.state.score[at] = torch.rand(len(at), device=at.device)


class StaticScorer(scorers.AttentionScorer):
    """The scores of the first boundary, which stay at each token's place, at every one."""

    def score_prefills(self, s, queries, keys, batch, is_first_layer) -> None:
        if keys.stage == 0:
            super().score_prefills(s, queries, keys, batch, is_first_layer)


SCORERS = {
    "random": RandomScorer,
    "static": StaticScorer,
    **{name: partial(RuleScorer, rule) for name, rule in RULES.items()},
}


def use(name: str | None) -> None:
    """Let the engines that this process starts score by one of ``SCORERS``."""
    if name is not None:
        scorers.SCORERS["peak"] = SCORERS[name]
