"""The engine with pruning on against the slow reference: the same sets, the same tokens, on a real
model. ``test_families`` does so for every family."""

import math

import pytest
import torch
from harness import agreement
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passkey import passkey_prompt

LENGTHS = (300, 480, 700, 1000, 1300)
NEW_TOKENS = 24
QUOTA = 15
BUDGETS = {"resident": 8192, "strict": 700, "by mass": 900}  # whole prompts, and chunks
CONFIGS = {
    # Stages of 11, 9 and 10 layers, and two pages of hidden states: one KV cache group each, padded
    # to 13.
    "resident": {"prune": [{"layer": 11, "keep": 0.5}, {"layer": 20, "keep": 0.25}]},
    # The paper's scores. The first stage is two groups, the last three.
    "strict": {
        "prune": [{"layer": 6, "keep": 0.6}, {"layer": 12, "keep": 0.2}],
        "decode": "strict",
        "score": "mean",
        "score_window": 1,
        "score_pool": 1,
    },
    # As many as hold the mass: for some prompts at some boundaries the most, the least for others.
    "by mass": {
        "prune": [{"layer": n, "keep": k} for n, k in ((6, 0.9), (13, 0.4), (21, 0.3))],
        "keep_mass": 0.8,
        "min_keep_tokens": 120,
    },
}


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [
        passkey_prompt(tokenizer, n, seed=i, depth=0.1 + 0.15 * i)[0] for i, n in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def hf_model(smollm2):
    return AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)


@pytest.mark.parametrize("decode", CONFIGS)
def test_engine_agrees_with_reference(decode, smollm2, prompts, hf_model, open_engine):
    # However many decode, as prompts are done: each may revive as many as QUOTA.
    common = {"min_prompt_tokens": 256, "first_tokens": 4, "last_tokens": 32}
    common |= {"revive_per_request": QUOTA}
    config = CONFIGS[decode] | common
    engine = open_engine(
        smollm2,
        config | {"revive_budget": QUOTA * len(prompts)},
        {"trace": True},
        max_num_batched_tokens=BUDGETS[decode],
    )
    if decode == "by mass":
        prompts = prompts[:4]
    result = engine.generate(prompts, NEW_TOKENS)
    chunks = [len(prefill["chunks"]) for (prefill,) in result["prefills"]]
    assert (max(chunks) == 1) == (decode == "resident")
    seen = agreement.compare(hf_model, prompts, config, QUOTA, result)
    seen.check(least_compared=0.6, most_ties=4)
    if decode == "by mass":
        _check_counts(config, result)
    _check_pieces(engine, len(config["prune"]) + 1, prompts, result)


def _check_counts(config, result) -> None:
    """That counts follow the prompt: the most, the least and something between all occur."""
    bounds, seen = [cut["keep"] for cut in config["prune"]], set()
    for entry in result["stats"]:
        for keep, count in zip(bounds, entry["kept"][1:]):
            most = max(math.ceil(keep * entry["prompt_tokens"]), config["min_keep_tokens"])
            assert config["min_keep_tokens"] <= count <= most
            seen.add("most" if count == most else "less")
            seen.add("least" if count == config["min_keep_tokens"] else "more")
    assert seen == {"most", "less", "least", "more"}


def _check_pieces(engine, num_stages, prompts, result) -> None:
    """The same again with stages in the pieces that CUDA graphs would be captured in."""
    engine.run("run_stages_in_pieces")
    assert engine.run("reset_prefix_cache")
    again = engine.generate(prompts, 4)
    ran = engine.run("stages_in_pieces")
    assert {stage for stage, _ in ran} == set(range(num_stages))
    assert again["tokens"] == [tokens[:4] for tokens in result["tokens"]]
    for mine, before in zip(again["prefills"], result["prefills"]):  # where chunks end may differ
        for stage in range(1, num_stages):
            assert mine[0][stage] == before[0][stage], "what is kept"
    assert again["free_blocks"][0] == again["free_blocks"][1]
