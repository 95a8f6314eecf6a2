"""Small KV caches: whatever is admitted finishes, right; what cannot is refused by itself."""

import random

import pytest
import torch
from harness import reference
from harness.tiny import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passkey import passkey_prompt
from lazyllm_vllm.plan.config import parse_config

PRUNE = [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}]
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return AutoTokenizer.from_pretrained(smollm2)


def test_preempted_requests_finish_right(smollm2, tokenizer, open_engine):
    """With so few blocks that requests are preempted, tokens are those of the reference for the
    prompt; where it had to be pruned anew, for it and what had been generated."""
    lengths = (380, 380, 380, 500)
    prompts = [
        passkey_prompt(tokenizer, 700, seed=i, depth=0.5)[0][-n:] for i, n in enumerate(lengths)
    ]
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_budget": 0, "last_tokens": 32}
    # A block is 128 tokens of ten layers and of two pages of hidden states. The prompts take 3 *
    # (3 + 2 + 1) + (4 + 2 + 1) = 25, and one each of their own, of the 30 that there are besides
    # vLLM's null block; each needs one or two more within 24 tokens.
    engine = open_engine(
        smollm2,
        config,
        {"trace": True},
        num_gpu_blocks_override=31,
        max_model_len=640,
        block_size=128,
    )
    result = engine.generate(prompts, NEW_TOKENS)
    assert result["preemptions"] > 0, "nothing was preempted: the test shows nothing"
    assert result["free_blocks"][0] == result["free_blocks"][1]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for prompt, tokens, prefills in zip(prompts, result["tokens"], result["prefills"]):
        assert len(tokens) == NEW_TOKENS
        lengths = [p["num_prompt"] for p in prefills if "resident" not in p]
        assert lengths[0] == len(prompt)
        ends = [*(n - len(prompt) for n in lengths[1:]), NEW_TOKENS]
        start = 0
        for end in ends:
            ref = reference.generate(
                model, prompt + tokens[:start], parse_config(config), end - start
            )
            assert tokens[start:end] == ref.tokens
            start = end


def _prompts(*lengths):
    rng = random.Random(1)
    return [[rng.randrange(200, 40000) for _ in range(n)] for n in lengths]


def test_what_never_fits_is_refused_and_stops_nobody(smollm2, open_engine):
    """Prompts just under ``min_prompt_tokens`` need more blocks than the longest pruned prompt."""
    config = {"prune": PRUNE, "min_prompt_tokens": 1000}
    # A prompt of 1,200 tokens: 10 + 6 + 4 blocks in the stages and 1 of its own. 999 that are not
    # pruned: 24.
    engine = open_engine(
        smollm2, config, num_gpu_blocks_override=22, max_model_len=1200, block_size=128
    )
    fate = engine.run(
        "admit", prompts=_prompts(1190, 999, 900, 897, 890, 3), max_tokens=8, most_steps=60
    )
    assert "prompts of 897 to 999 tokens are refused" in engine.log
    finished = {name for name, end in fate.items() if end == "finished"}
    assert finished == {"a0", "a5"}
    for name in ("a1", "a2", "a3", "a4"):  # the last would outgrow the cache
        assert "lower max_tokens, lower min_prompt_tokens" in fate[name]


def test_a_request_that_outgrows_the_cache_goes_on(tmp_path, open_engine):
    """A short prompt that grows is preempted alone, and prefilled with what it has; those behind
    it are served."""
    config = {
        "prune": [{"layer": 2, "keep": 0.3}, {"layer": 4, "keep": 0.1}],
        "min_prompt_tokens": 100,
        "revive_budget": 0,
    }
    # Blocks of 16 tokens of two pages: three for two layers and the hidden states of stage 0, which
    # has two groups, and one for each of the others. 256 tokens take 2 * 16 in stage 0, 5 and 2
    # pruned, 2 of their own, as many as there are; 161 that are not pruned take 4 * 11.
    engine = open_engine(
        tiny_model(tmp_path),
        config,
        load_format="dummy",
        skip_tokenizer_init=True,
        max_model_len=256,
        block_size=16,
        num_gpu_blocks_override=42,
    )
    result = engine.generate([[7 + i % 900 for i in range(n)] for n in (90, 3, 200)], 50)
    assert [len(tokens) for tokens in result["tokens"]] == [50] * 3
    alone = engine.generate([[7 + i % 900 for i in range(90)]], 160)
    assert alone["preemptions"] > 0, "it never outgrew the cache: the test shows nothing"
    assert len(alone["tokens"][0]) == 160
    assert alone["free_blocks"][0] == alone["free_blocks"][1]
