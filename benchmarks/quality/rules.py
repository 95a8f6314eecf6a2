"""What others choose tokens by, and rules near LazyLLM's own. ``rule_scorer`` scores by them.

A rule makes one number of a token's attention weights, step by step: over the queries of the
window, over the heads, over the layers, over the neighbours.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Rule:
    """The defaults are LazyLLM's own ``peak``.

    Attributes:
        queries: over the tokens of the window: the highest, those before the last ``in_full`` ones
            times ``earlier``; or the sum, all in full.
        heads: over the heads.
        pool: odd; before the heads are put together a token's weight in each becomes the highest of
            so many around it, among the tokens before the window.
        layers: how many layers count, the last ones so far, by the highest; None: all so far; 1:
            the last one before a boundary.
        decay: the layers are added up instead, what there was before a layer times this.
        block: so many neighbours, by position, have one score: their highest, or their mean.
    """

    queries: Literal["peak", "sum"] = "peak"
    in_full: int = 4
    earlier: float = 0.25
    heads: Literal["peak", "sum", "mean"] = "peak"
    pool: int = 1
    layers: int | None = None
    decay: float | None = None
    block: int = 1
    block_score: Literal["peak", "mean"] = "peak"


# FastKV (arXiv 2502.01068), as in its code.
FASTKV = Rule(queries="sum", heads="sum", pool=7, layers=1)
# UniPrefill (arXiv 2605.06221): the sum over the queries is a mass like their mean.
UNIPREFILL = Rule(queries="sum", heads="mean", layers=1, block=64, block_score="mean")
# LazyLLM's own with one step changed.
VARIANTS = {
    "LazyLLM's rule": Rule(),
    "peak of four layers": Rule(layers=4),
    "layers decayed": Rule(decay=0.9),
    "heads summed": Rule(heads="sum"),
    "window in full": Rule(earlier=1.0),
    "last token in full": Rule(in_full=1),
    "chunks of 16": Rule(block=16),
    "chunks of 32": Rule(block=32),
}
RULES = {"FastKV": FASTKV, "UniPrefill": UNIPREFILL, **VARIANTS}
