"""What tokens are chosen by. Another scorer is another class here, or an entry put into
``SCORERS`` before an engine starts."""

from lazyllm_vllm.kernels.paged import StageKeys
from lazyllm_vllm.kernels.queries import Queries, ScoreRule
from lazyllm_vllm.kernels.score import score_tokens
from lazyllm_vllm.kernels.selection import Selection


class AttentionScorer:
    """The attention that a request's last tokens pay to a token: the peak over heads and over the
    layers so far that score. See ``kernels.score``.

    In decoding the score of the step before still counts, by the share ``carry``, and with it what
    the layers behind the last boundary attended to. So what follows the token that was just copied
    is there for the next step, though no layer before a boundary looks at it.

    Attributes:
        every_layer: whether prefills are scored in every layer before the last boundary; else in
            the last layer of each stage.
        carry: of ``LazyLLMConfig.score_carry``; 0: each layer's scores stand alone.
    """

    every_layer = True
    peak = True

    def __init__(self, carry: float) -> None:
        self.carry = carry

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

    def score_turns(self, s: Selection, queries: Queries, keys: StageKeys, batch: range) -> None:
        """The same for the last tokens of turns, beside what the tokens before them attended to."""
        rule = ScoreRule(self.peak, accumulates=self.every_layer)
        score_tokens(s, queries, keys, batch, s.active[0], rule)

    def score_decodes(self, s: Selection, queries: Queries, keys: StageKeys, batch: range) -> None:
        """The same for the decodes of ``batch`` that are active (``s.active``): in a stage's last
        layer, and with ``carry`` in those behind the last boundary."""
        if not self.carry:
            active, rule = s.active[keys.stage + 1], ScoreRule(self.peak, accumulates=False)
        elif keys.stage == 0:
            active, rule = s.active[0], ScoreRule(self.peak, False, self.carry)
        else:
            active, rule = s.active[0], ScoreRule(self.peak, accumulates=True)
        score_tokens(s, queries, keys, batch, active, rule)


class MeanAttentionScorer(AttentionScorer):
    """The mean over heads in the last layer before a boundary (the paper, section 3.2)."""

    every_layer = False
    peak = False


# By the configuration's ``score``.
SCORERS: dict[str, type[AttentionScorer]] = {"peak": AttentionScorer, "mean": MeanAttentionScorer}
