"""What the tests of ``reuse: deep`` have in common: an engine's configuration, what is asked of it,
and what they read of requests that go on from others."""

import random

QUOTA, MOST, NEW_TOKENS = 4, 40, 8
BLOCK = 32
# Prompts and turns of 120 tokens and more are pruned. Stage 0 has one layer and one page of hidden
# states.
CONFIG = {
    "prune": [{"layer": 1, "keep": 0.6}, {"layer": 2, "keep": 0.3}, {"layer": 4, "keep": 0.2}],
    "min_prompt_tokens": 120,
    "score_window": 16,
    "score_pool": 3,
    "revive_per_request": QUOTA,
    "revive_per_turn": QUOTA,
    "revive_min_score": 0,
    "reuse": "deep",
}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": BLOCK,
    "max_model_len": 640,
    "max_num_seqs": MOST,
    "scheduling_policy": "priority",
}
_RNG = random.Random(0)
DOCUMENTS = [[_RNG.randrange(3, 1000) for _ in range(300)] for _ in range(4)]
QUESTIONS = [[_RNG.randrange(3, 1000) for _ in range(n)] for n in (40, 3, 90, 21, 60)]
_GREEDY = {"temperature": 0, "ignore_eos": True}


def asked(prompt: list[int], **fields) -> dict:
    """As ``harness.engine.serve`` takes it; ``params`` beside those of a greedy answer of
    ``NEW_TOKENS``."""
    params = _GREEDY | {"max_tokens": NEW_TOKENS} | fields.pop("params", {})
    return {"prompt": prompt, "params": params} | fields


def goes_on(result: dict, i: int = 0) -> bool:
    """Whether a traced request went on from a snapshot, when it last began."""
    return "resident" in result["prefills"][i][-1]
