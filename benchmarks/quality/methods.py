"""Ways to drop tokens, all through the same engine: LazyLLM, parts of it, and what it is compared
with. At the same schedule they take the same prefill. ``rivals`` has those with cuts of their own.

What LazyLLM does not have are scorers of their own, see ``scorers``.
"""

from dataclasses import dataclass

from benchmarks.quality.compression import Compression
from benchmarks.quality.rules import VARIANTS

NO_REVIVAL = {"revive_budget": 0}
UNLIMITED = {"revive_budget": 1 << 20, "revive_per_request": 1 << 20, "revive_reserve": 1.0}
PAPER_SCORE = {"score": "mean", "score_window": 1}
PAPER = (
    PAPER_SCORE
    | UNLIMITED
    | {
        "score_pool": 1,
        "first_tokens": 0,
        "last_tokens": 1,
        "decode": "strict",
    }
)


@dataclass(frozen=True)
class Method:
    """Attributes:
    config: fields of LazyLLM's configuration that differ from the defaults; None: stock vLLM.
    scorer: name of one of ``scorers.SCORERS``; None: LazyLLM's own. Where stock vLLM answers
        compressed prompts: how they are compressed.
    """

    name: str
    config: dict | None
    scorer: str | Compression | None = None


FULL = Method("full model", None)
LAZYLLM = Method("LazyLLM", {})
METHODS = (
    FULL,
    LAZYLLM,
    Method("as in the paper", PAPER),
    Method("LazyLLM, strict", {"decode": "strict"}),
    Method("LazyLLM, no revival", NO_REVIVAL),
    Method("LazyLLM, no pooling", {"score_pool": 1}),
    Method("static", NO_REVIVAL, "static"),
    Method("random", NO_REVIVAL | {"score_pool": 1}, "random"),
)
# One default changed at a time.
OPTIONS = tuple(
    Method(", ".join(f"{name} {value}" for name, value in config.items()), config)
    for config in (
        PAPER_SCORE,
        {"score": "mean"},
        {"score_window": 1},
        {"score_window": 4},
        {"score_window": 32, "last_tokens": 32},
        {"first_tokens": 0},
        {"first_tokens": 16},
        {"last_tokens": 64},
    )
)
# All of the budget for each request.
REVIVAL = (
    *(
        Method(f"revive_budget {n}", {"revive_budget": n, "revive_per_request": max(n, 1)})
        for n in (0, 16, 64)
    ),
    Method("unlimited", UNLIMITED),
)
# Ways to score, all without revival: other scorers, whose chunks stand for pooling, and windows.
SCORES = (
    *(
        Method(name, NO_REVIVAL | ({"score_pool": 1} if rule.block > 1 else {}), name)
        for name, rule in VARIANTS.items()
    ),
    *(
        Method(f"window {n}", NO_REVIVAL | {"score_window": n, "last_tokens": max(n, 16)})
        for n in (1, 4, 16, 32, 64, 128)
    ),
)
# Which neighbours of a token are kept with it.
POOLS = tuple(
    Method(f"pool {before}, {after}", {"score_pool": (before, after)})
    for before, after in ((6, 6), (12, 6), (12, 12), (16, 2), (20, 4), (24, 6))
)
# What a prompt takes of those before it; with "off" it is as if it was asked alone.
REUSES = tuple(Method(f"reuse {reuse}", {"reuse": reuse}) for reuse in ("off", "exact", "deep"))
# By the prompt: what holds this share of its scores.
MASS = tuple(
    Method(f"keep_mass {mass}", {"keep_mass": mass, "min_keep_tokens": 128})
    for mass in (0.5, 0.7, 0.8, 0.9)
)
