"""Answers of the real engine: stock vLLM's where nothing is dropped, whatever stands beside."""

import random

import pytest

PRUNE = [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}]
WHOLE = [{"layer": 10, "keep": 1}, {"layer": 20, "keep": 1}]
LENGTHS = (1, 5, 128, 129, 300, 390, 560, 2, 450)
SHORT = [i for i, n in enumerate(LENGTHS) if n < 400]


@pytest.fixture(scope="module")
def noise():
    rng = random.Random(0)
    return [[rng.randrange(200, 40000) for _ in range(n)] for n in LENGTHS]


@pytest.fixture(scope="module")
def stock_engine(smollm2, open_engine):
    return open_engine(smollm2)


@pytest.fixture(scope="module")
def stock(stock_engine, noise):
    return stock_engine.generate(noise, 6, logprobs=5)


@pytest.fixture(scope="module")
def pruning(smollm2, open_engine):
    """Prompts under 400 tokens are not pruned."""
    config = {"prune": PRUNE, "min_prompt_tokens": 400, "revive_budget": 32}
    return open_engine(smollm2, config)


def _of(result, which):
    return {k: [result[k][i] for i in which] for k in ("tokens", "logprobs")}


def _close(mine: list[dict], theirs: list[dict]) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        assert max(abs(a[t] - b[t]) for t in a) < 1e-3


def _assert_same(result, expected):
    assert result["tokens"] == expected["tokens"]
    for mine, theirs in zip(result["logprobs"], expected["logprobs"], strict=True):
        _close(mine, theirs)


def test_without_a_config_vllm_is_stock(stock_engine, stock):
    assert stock_engine.run("facts")["model_class"] == "LlamaForCausalLM"
    assert "LazyLLM is on" not in stock_engine.log


def test_keeping_everything_is_stock_vllm(smollm2, open_engine, noise, stock):
    engine = open_engine(smollm2, {"prune": WHOLE})
    result = engine.generate(noise, 6, logprobs=5)
    assert engine.run("facts")["model_class"] == "LazyLlamaForCausalLM"
    assert "LazyLLM is on" in engine.log and "keep 1 of the prompt" in engine.log
    _assert_same(result, stock)
    assert all(entry["share_computed"] == 1 for entry in result["stats"])
    assert result["free_blocks"][0] == result["free_blocks"][1]


def test_short_prompts_are_stock_vllm_beside_long_ones(pruning, stock_engine, noise, stock):
    """Unpruned requests in batches with pruned ones, on both sides of the boundary."""
    result = pruning.generate(noise, 6, logprobs=5)
    _assert_same(_of(result, SHORT), _of(stock, SHORT))
    kept = {entry["prompt_tokens"]: entry["kept"] for entry in result["stats"]}
    assert kept[560] == [560, 280, 140] and kept[390] == [390, 390, 390]
    assert pruning.run("facts")["room"] > 1.2 * stock_engine.run("facts")["room"]


def test_short_prompts_in_chunks_are_stock_vllm(pruning, noise, stock):
    """First cold, then with what the first run left in the cache, of stage 0 alone, so that the
    later stages catch up; beside a long prompt in both."""
    which = [i for i, n in enumerate(LENGTHS) if n in (5, 129, 390, 560)]
    prompts, short = [noise[i] for i in which], [at for at, i in enumerate(which) if i in SHORT]
    pruning.run("reset_prefix_cache")
    for budget in (200, 333):
        pruning.run("set_budget", tokens=budget)
        result = pruning.generate(prompts, 6, logprobs=5)
        # Whole blocks of 128 tokens, but the last token runs, and of the long prompt the last 16.
        assert result["cached"] == ([0, 0, 0, 0] if budget == 200 else [0, 128, 384, 512])
        _assert_same(_of(result, short), _of(stock, [which[at] for at in short]))
        assert result["free_blocks"][0] == result["free_blocks"][1]
        kept = [entry["kept"] for entry in result["stats"]]
        assert kept == [[n] * 3 for n in (5, 129, 390)] + [[560, 280, 140]]


def test_prompt_logprobs_of_a_prompt_that_is_not_pruned_are_stock_vllms(
    pruning, stock_engine, noise
):
    """What evaluation harnesses ask for; they are refused for a prompt that is pruned. In chunks of
    at most 16 tokens. Few tokens: vLLM's own kernel for them is slow in Triton's interpreter."""
    prompts = [noise[0], noise[1], noise[4][:40]]
    pruning.run("set_budget", tokens=16)
    mine, theirs = (e.generate(prompts, 2, prompt_logprobs=3) for e in (pruning, stock_engine))
    assert [len(p) for p in mine["prompt_logprobs"]] == [0, 4, 39]
    for a, b in zip(mine["prompt_logprobs"], theirs["prompt_logprobs"], strict=True):
        _close(a, b)
    with pytest.raises(RuntimeError, match="prompt_logprobs does not work for a prompt of 560"):
        pruning.generate([noise[LENGTHS.index(560)]], 2, prompt_logprobs=3)


def test_steps_that_drop_nothing_run_in_pieces(smollm2, open_engine, noise, stock):
    """What CUDA graphs are captured around on a GPU, and the warm-up before it."""
    engine = open_engine(smollm2, {"prune": PRUNE, "min_prompt_tokens": 400})
    engine.run("run_as_on_gpu")
    result = engine.generate([noise[i] for i in SHORT], 6, logprobs=5)
    _assert_same(result, _of(stock, SHORT))
    assert result["free_blocks"][0] == result["free_blocks"][1]
    assert all(result["stats"])
