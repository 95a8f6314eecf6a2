"""Ways to drop tokens, all through the same engine: LazyLLM, parts of it, and what it is compared
with. At the same schedule they take the same prefill.

The two that LazyLLM does not have replace what scores tokens, in the engine's process alone.
"""

from dataclasses import dataclass

NO_REVIVAL = {"revive_budget": 0}
UNLIMITED = {"revive_budget": 1 << 20, "revive_per_request": 1 << 20, "revive_reserve": 1.0}
PAPER_SCORE = {"score": "mean", "score_window": 1}
PAPER = PAPER_SCORE | UNLIMITED | {
    "score_pool": 1, "first_tokens": 0, "last_tokens": 1, "decode": "strict",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """Attributes:
    config: fields of LazyLLM's configuration that differ from the defaults; None: stock vLLM.
    scores: ``attention``; ``random``; or ``static``, those of the first boundary at every one.
    """

    name: str
    config: dict | None
    scores: str = "attention"


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
        {"score_pool": 7},
        {"score_pool": 25},
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


def use_scores(kind: str) -> None:
    """Make the staged attention of this process score tokens so."""
    from lazyllm_vllm import attention

    original = attention.score_tokens

    def static(token_score, *args):
        if args[-3] == 0:  # the stage; what it scored stays at each token's place
            original(token_score, *args)

    def random(token_score, *args):
        token_score.uniform_()

    attention.score_tokens = {"attention": original, "static": static, "random": random}[kind]
