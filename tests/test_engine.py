"""The real engine on the CPU: same answers as stock vLLM, preemption, aborts, nothing lost."""

import random

import engine
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passkey import passkey_prompt
from lazyllm_vllm import reference
from lazyllm_vllm.config import parse_config

PRUNE = [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}]
WHOLE = [{"layer": 10, "keep": 1}, {"layer": 20, "keep": 1}]
LENGTHS = (1, 5, 128, 129, 300, 640, 1000, 2, 777)


@pytest.fixture(scope="module")
def noise():
    rng = random.Random(0)
    return [[rng.randrange(200, 40000) for _ in range(n)] for n in LENGTHS]


@pytest.fixture(scope="module")
def stock(smollm2, noise):
    return engine.run(smollm2, noise, None, max_tokens=6, logprobs=5)


def _assert_same(result, stock):
    assert result["tokens"] == stock["tokens"]
    for mine, theirs in zip(result["logprobs"], stock["logprobs"]):
        for a, b in zip(mine, theirs):
            assert a.keys() == b.keys()
            assert max(abs(a[t] - b[t]) for t in a) < 1e-3


def test_without_a_config_vllm_is_stock(stock):
    assert stock["model_class"] == "LlamaForCausalLM"
    assert "LazyLLM is on" not in stock["log"]


def test_keeping_everything_is_stock_vllm(smollm2, noise, stock):
    result = engine.run(smollm2, noise, {"prune": WHOLE}, max_tokens=6, logprobs=5)
    assert result["model_class"] == "LazyLlamaForCausalLM"
    assert "LazyLLM is on" in result["log"] and "keep 1 of the prompt" in result["log"]
    _assert_same(result, stock)
    assert result["stats"]["total"]["share_computed"] == 1.0
    assert result["free_blocks"][0] == result["free_blocks"][1]


def test_short_prompts_are_stock_vllm_beside_long_ones(smollm2, noise, stock):
    """Unpruned requests in batches with pruned ones, on both sides of the boundary."""
    config = {"prune": PRUNE, "min_prompt_tokens": 650, "revive_budget": 32}
    result = engine.run(smollm2, noise, config, max_tokens=6, logprobs=5)
    short = [i for i, n in enumerate(LENGTHS) if n < 650]
    _assert_same(
        {k: [result[k][i] for i in short] for k in ("tokens", "logprobs")},
        {k: [stock[k][i] for i in short] for k in ("tokens", "logprobs")},
    )
    kept = {r["prompt_tokens"]: r["kept"] for r in result["stats"]["requests"]}
    assert kept[1000] == [1000, 500, 250] and kept[640] == [640, 640, 640]
    assert result["room"] > 1.2 * stock["room"]


def test_steps_that_drop_nothing_run_in_pieces(smollm2, noise, stock):
    """What CUDA graphs are captured around on a GPU, and the warm-up before it."""
    short = [i for i, n in enumerate(LENGTHS) if n < 650]
    result = engine.run(
        smollm2, [noise[i] for i in short], {"prune": PRUNE, "min_prompt_tokens": 650},
        max_tokens=6, logprobs=5, as_on_gpu=True,
    )  # fmt: skip
    _assert_same(result, {k: [stock[k][i] for i in short] for k in ("tokens", "logprobs")})
    assert result["free_blocks"][0] == result["free_blocks"][1]
    assert len(result["stats"]["requests"]) == len(short)


def test_requests_without_room_go_on_without_selecting(smollm2, noise):
    """The same answers as when every step selects, which a trace makes it do."""
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_reserve": 0.02}
    prompts = [p for p in noise if 256 <= len(p) <= 700]
    plain, selecting = (
        engine.run(smollm2, prompts, config, max_tokens=32, logprobs=5, trace=trace)
        for trace in (False, True)
    )
    assert len(plain["full"]) == len(prompts) and not selecting["full"]
    assert sum(plain["stats"]["total"]["revived"]) > 0
    assert plain["stats"]["total"]["revived"] == selecting["stats"]["total"]["revived"]
    _assert_same(plain, selecting)


def test_the_batch_does_not_matter(smollm2, noise):
    """Without revival, whose share depends on the batch, a request gets the same answer in a batch
    with others as by itself."""
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_budget": 0, "decode": "strict"}
    prompts = [p for p in noise if len(p) >= 128]
    together = engine.run(smollm2, prompts, config, max_tokens=6, logprobs=5)
    alone = engine.run(
        smollm2, prompts, config, engine={"max_num_seqs": 1}, max_tokens=6, logprobs=5
    )
    _assert_same(together, alone)


def test_preempted_requests_finish_right(smollm2):
    """With so few blocks that requests are preempted, each prefill's tokens are those of the
    reference for the prompt and what had been generated."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    lengths = (380, 380, 380, 500)
    prompts = [
        passkey_prompt(tokenizer, 700, seed=i, depth=0.5)[0][-n:] for i, n in enumerate(lengths)
    ]
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_budget": 0, "last_tokens": 32}
    new_tokens = 24
    # A block is 128 tokens of ten layers. The prompts take 3 * (3 + 2 + 1) + (4 + 2 + 1) = 25 of
    # the 26 that there are besides vLLM's null block; each needs one or two more within 24 tokens.
    result = engine.run(
        smollm2, prompts, config,
        engine={"num_gpu_blocks_override": 27, "max_model_len": 640, "block_size": 128},
        max_tokens=new_tokens, trace=True,
    )  # fmt: skip
    assert result["preemptions"] > 0, "nothing was preempted: the test shows nothing"
    assert result["free_blocks"][0] == result["free_blocks"][1]
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    for i, prompt in enumerate(prompts):
        request_id = next(r for r in result["trace"]["prefills"] if r.split("-")[0] == str(i))
        tokens = result["tokens"][i]
        assert len(tokens) == new_tokens
        lengths = [p["num_prompt"] for p in result["trace"]["prefills"][request_id]]
        assert lengths[0] == len(prompt)
        ends = [*(n - len(prompt) for n in lengths[1:]), new_tokens]
        start = 0
        for end in ends:
            ref = reference.generate(
                model, prompt + tokens[:start], parse_config(config), end - start
            )
            assert tokens[start:end] == ref.tokens
            start = end


def test_aborted_requests_leave_nothing_behind(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [passkey_prompt(tokenizer, 400, seed=i, depth=0.5)[0] for i in range(5)]
    config = {"prune": PRUNE, "min_prompt_tokens": 256}
    result = engine.run(smollm2, prompts, config, max_tokens=8, scenario="abort")
    assert result["free_blocks"][0] == result["free_blocks"][1]
    finished = result["tokens_by_request"]
    assert {r for r, t in finished.items() if len(t) == 8} == {"r3", "r4"}
    assert len(finished.get("r0", [])) < 8 and len(finished.get("r1", [])) < 8
