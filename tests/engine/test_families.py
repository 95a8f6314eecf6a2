"""Every family of models: a tiny one with random weights, in fp32.

Keeping every token is stock vLLM; with pruning, the engine's sets and tokens are the reference's.
"""

import math
import random

import pytest
import torch
from harness import agreement, families
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passkey import passkey_prompt

LENGTHS = (40, 300, 700, 1100)
NEW_TOKENS = 8
QUOTA = 8
CONFIG = {"min_prompt_tokens": 256, "first_tokens": 4, "last_tokens": 32}
# However many decode, as prompts are done: each may revive as many as QUOTA.
CONFIG |= {"revive_per_request": QUOTA, "revive_min_score": 0}
CONFIG |= {"revive_per_turn": QUOTA, "reuse": "deep"}
# The first two prompts come whole, the others in chunks.
OPTIONS = {"skip_tokenizer_init": True, "max_num_batched_tokens": 512}


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in LENGTHS]


def assert_close(mine: dict, theirs: dict, tolerance: float = 1e-3) -> None:
    """The same tokens, and log-probabilities but for rounding."""
    assert mine["tokens"] == theirs["tokens"]
    for steps in zip(mine["logprobs"], theirs["logprobs"], strict=True):
        for a, b in zip(*steps, strict=True):
            shared = a.keys() & b.keys()  # the last of the likeliest may swap with the next
            assert len(shared) >= len(a) - 1
            assert max(abs(a[t] - b[t]) for t in shared) < tolerance


# Of these, which have layers with windows, a prompt goes on from what it left.
GOING_ON = ("gemma3", "gpt_oss")
# A checkpoint that calls Llama otherwise is the same class: ``tests/unit/test_architectures.py``.
NAMES = [name for name in families.NAMES if not families.FAMILIES[name].edits]


@pytest.mark.parametrize("name", NAMES)
def test_a_family(name, tmp_path, prompts, open_engine):
    folder = families.save_tiny(name, tmp_path)
    allowed = {} if families.FAMILIES[name].has_row else {"allow_untested_model": True}
    keep_1 = [{"layer": layer, "keep": 1} for layer in families.boundaries(name)]
    keep = zip(families.boundaries(name), (0.5, 0.25))
    config = CONFIG | allowed | {"prune": [{"layer": n, "keep": share} for n, share in keep]}
    stock = open_engine(folder, **OPTIONS)
    whole = open_engine(folder, allowed | {"prune": keep_1}, **OPTIONS)
    budget = {"revive_budget": QUOTA * len(prompts)}
    pruned = open_engine(folder, config | budget, {"trace": True}, **OPTIONS)
    expected = stock.generate(prompts, NEW_TOKENS, logprobs=3)
    assert_close(whole.generate(prompts, NEW_TOKENS, logprobs=3), expected)
    result = pruned.generate(prompts, NEW_TOKENS)
    assert ("allow_untested_model lets it run" in pruned.log) == bool(allowed)
    assert [len(p[-1]["chunks"]) > 1 for p in result["prefills"]] == [False, False, True, True]
    # The second is a long turn: of its own tokens some are dropped.
    turns = [prompts[0][:20], prompts[2][:257]] if name in GOING_ON else []
    results = [{key: [result[key][1]] for key in ("tokens", "prefills", "decodes")}]
    said = list(prompts[1])
    for turn in turns:
        said += results[-1]["tokens"][0] + turn
        results.append(pruned.generate([said], NEW_TOKENS))
    for engine in (stock, whole, pruned):
        engine.close()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = agreement.compare(model, prompts, config, QUOTA, result)
    seen.check(least_compared=0.5, most_ties=2)
    if turns:
        seen = agreement.compare_turns(model, prompts[1], turns, config, QUOTA, results)
        seen.check(least_compared=0.9, most_ties=1)


def test_gemma_finds_a_pass_key(gemma3, open_engine):
    """A real model with sliding windows, its prompts three windows long and more, in chunks; asked
    again it finds its first layers' work done."""
    tokenizer = AutoTokenizer.from_pretrained(gemma3)
    asked = [passkey_prompt(tokenizer, n, seed=n, depth=0.4) for n in (1500, 2500)]
    prompts = [prompt for prompt, _ in asked]
    options = {"dtype": "bfloat16", "max_model_len": 3072, "max_num_batched_tokens": 1024}
    stock = open_engine(gemma3, **options)
    pruned = open_engine(gemma3, {"preset": "balanced"}, **options)
    for engine in (stock, pruned, pruned):
        result = engine.generate(prompts, 8)
        for (_, key), tokens in zip(asked, result["tokens"], strict=True):
            assert key in tokenizer.decode(tokens).replace(" ", "")
    # Less than a block of what may be found is not.
    assert all(len(p) - 16 - hit < 128 for p, hit in zip(prompts, result["cached"], strict=True))
    fifths = [math.ceil(len(prompt) / 5) for prompt in prompts]
    assert [stats["kept"][-1] for stats in result["stats"]] == fifths
