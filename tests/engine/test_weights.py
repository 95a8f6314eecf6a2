"""Quantized weights and an FP8 KV cache, on a tiny Llama: unpruned prompts as in stock vLLM, pruned
ones with the kept counts of the schedule. FP8 weights need a GPU: ``tests/gpu``."""

import random

import pytest
from harness import families, quantized

LENGTHS = (40, 120, 200, 700)
OPTIONS = {"skip_tokenizer_init": True, "dtype": "bfloat16", "max_num_batched_tokens": 4096}
CONFIG = {
    "prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}],
    "min_prompt_tokens": 256,
    "last_tokens": 16,
}
KEPT = [700, 350, 175]


@pytest.fixture(scope="module")
def prompts():
    rng = random.Random(0)
    return [[rng.randrange(3, 1000) for _ in range(n)] for n in LENGTHS]


@pytest.fixture(scope="module")
def plain(tmp_path_factory, prompts, open_engine):
    """Stock vLLM's answers without any of it."""
    folder = families.save_tiny("llama", tmp_path_factory.mktemp("plain"))
    return folder, open_engine(folder, **OPTIONS).generate(prompts, 2, logprobs=20)


def difference(mine: dict, theirs: dict, step: int) -> float:
    """Of the log-probabilities that both have among the likeliest, on average over the prompts that
    are not pruned and got to this step by the same tokens."""
    off = []
    for i in range(len(LENGTHS) - 1):
        if mine["tokens"][i][:step] == theirs["tokens"][i][:step]:
            a, b = mine["logprobs"][i][step], theirs["logprobs"][i][step]
            off += [abs(a[token] - b[token]) for token in a.keys() & b.keys()]
    assert off
    return sum(off) / len(off)


@pytest.mark.parametrize("method", quantized.CONFIGS)
def test_quantized_weights(method, tmp_path, prompts, plain, open_engine):
    folder = quantized.save_quantized(method, tmp_path)
    stock = open_engine(folder, **OPTIONS).generate(prompts, 2, logprobs=20)
    mine = open_engine(folder, CONFIG, **OPTIONS).generate(prompts, 2, logprobs=20)
    assert mine["stats"][-1]["kept"] == KEPT
    # In bf16 two orders of adding up differ too, and int8 activations widen that.
    assert difference(mine, stock, 0) < 0.1
    assert difference(plain[1], stock, 0) > 0.15, "weights that were not quantized: a weak test"


def test_an_fp8_kv_cache(prompts, plain, open_engine):
    """A prefill attends to keys as they were computed, so that its token is that of a cache in the
    model's dtype; stock's, read back in FP8, is not. Decoding is no further off than that."""
    folder, whole = plain
    options = OPTIONS | {"kv_cache_dtype": "fp8"}
    stock = open_engine(folder, **options).generate(prompts, 2, logprobs=20)
    mine = open_engine(folder, CONFIG, **options).generate(prompts, 2, logprobs=20)
    assert mine["stats"][-1]["kept"] == KEPT
    assert difference(mine, whole, 0) < 0.05 < difference(stock, whole, 0)
    assert 0 < difference(mine, whole, 1) < 1.2 * difference(stock, whole, 0)
