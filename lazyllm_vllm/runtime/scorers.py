"""What tokens are chosen by. Another scorer is another class here, or an entry put into
``SCORERS`` before an engine starts."""

import torch

from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.score import Queries, ScoreRule, score_tokens
from lazyllm_vllm.kernels.selection import Selection


class AttentionScorer:
    """The attention that a request's last tokens pay to a token: the peak over heads and, in a
    prefill, over the layers so far. See ``kernels.score``.

    Attributes:
        every_layer: whether prefills are scored in every layer before the last boundary; else in
            the last layer of each stage.
    """

    every_layer = True
    peak = True

    def score_prefills(
        self,
        s: Selection,
        queries: Queries,
        keys: StageKeys,
        batch: range,
        is_first_layer: bool,
    ) -> None:
        """Score the prompts of ``batch`` that are pruned (``s.is_pruned``), after one layer.

        Writes ``s.state.score`` of every prompt token that has keys in the stage.
        """
        rule = ScoreRule(self.peak, accumulates=self.every_layer and not is_first_layer)
        score_tokens(s, queries, keys, batch, s.is_pruned, rule)

    def score_decodes(
        self,
        s: Selection,
        queries: Queries,
        keys: StageKeys,
        batch: range,
        active: torch.Tensor,
    ) -> None:
        """The same for the decodes of ``batch`` that are ``active``, in a stage's last layer."""
        score_tokens(s, queries, keys, batch, active, ScoreRule(self.peak, accumulates=False))


class MeanAttentionScorer(AttentionScorer):
    """The mean over heads in the last layer before a boundary (the paper, section 3.2)."""

    every_layer = False
    peak = False


# By the configuration's ``score``.
SCORERS: dict[str, type[AttentionScorer]] = {"peak": AttentionScorer, "mean": MeanAttentionScorer}
