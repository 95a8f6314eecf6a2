"""Requests with settings of their own in one batch: each has the answer, the kept counts and the
revived tokens that the slow reference has by that setting alone."""

import pytest
import torch
from harness import reference
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.passkey import passkey_prompt
from lazyllm_vllm.plan.blocks import BlockNeeds
from lazyllm_vllm.plan.config import parse_config
from lazyllm_vllm.plan.schedule import Schedule

COMMON = {"min_prompt_tokens": 256, "first_tokens": 4, "last_tokens": 16}
COMMON |= {"revive_per_request": 8, "revive_min_score": 0}
OWN = [{"layer": 10, "keep": 0.4}, {"layer": 20, "keep": 0.2}]
MILD = [{"layer": 15, "keep": 0.6}]


def _at_all_cuts(*keeps: float) -> list[dict]:
    return [{"layer": layer, "keep": keep} for layer, keep in zip((10, 15, 20), keeps)]


# What a request sets, and the configuration that means the same for it alone: with every boundary,
# since decoding chooses anew at each.
ASKED = (
    (None, {"prune": _at_all_cuts(0.4, 0.4, 0.2)}),
    ({"lazyllm": "off"}, {"prune": []}),
    ({"lazyllm": "mild"}, {"prune": _at_all_cuts(1, 0.6, 0.6)}),
    ({"lazyllm_keep": 2}, {"prune": _at_all_cuts(0.8, 0.8, 0.4)}),
    ({"lazyllm_revive": "off"}, {"prune": _at_all_cuts(0.4, 0.4, 0.2), "revive_reserve": 0}),
)
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def prompts(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    return [passkey_prompt(tokenizer, 270 + 30 * i, seed=i, depth=0.3)[0] for i in range(5)]


@pytest.fixture(scope="module")
def engine(smollm2, open_engine):
    config = COMMON | {"prune": OWN, "schedules": {"mild": MILD}, "revive_budget": 8 * len(ASKED)}
    return open_engine(smollm2, config, max_num_batched_tokens=500)


def test_each_request_has_its_own(engine, smollm2, prompts):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    result = engine.generate(prompts, NEW_TOKENS, extra_args=[extra for extra, _ in ASKED])
    assert result["free_blocks"][0] == result["free_blocks"][1]
    for i, (_, alone) in enumerate(ASKED):
        config = parse_config(COMMON | alone | {"revive_budget": 8})
        ref = reference.generate(model, prompts[i], config, NEW_TOKENS)
        assert result["tokens"][i] == ref.tokens, ASKED[i]
        stats, n = result["stats"][i], len(prompts[i])
        assert stats["share_computed"] == pytest.approx(ref.share_computed), ASKED[i]
        whole = [n] * 4 if len(ref.kept) == 1 else [len(kept) for kept in ref.kept]
        assert stats["kept"] == whole, ASKED[i]
    assert sum(result["stats"][0]["revived"]) > 0 and sum(result["stats"][4]["revived"]) == 0


def test_what_is_not_allowed_is_refused(engine, prompts):
    """The engine under test ends at an error; ``test_serve`` shows that a server goes on."""
    with pytest.raises(RuntimeError, match="lazyllm: 'fast' is none of off, mild"):
        engine.generate(prompts[:1], 1, extra_args=[{"lazyllm": "fast"}])


def test_what_could_never_fit_is_refused(smollm2, open_engine):
    """Room for the longest prompt as the engine prunes it, and not for all of its tokens."""
    config = COMMON | {"prune": [{"layer": 5, "keep": 0.1}]}
    schedule = Schedule.build(parse_config(config), 30)
    page = 16 * 2 * 3 * 64 * 4  # bytes of 16 tokens' keys and values of 3 heads in fp32
    blocks = BlockNeeds(schedule, 16, page, 576 * 4).total(2000, 2000) + 1  # one is vLLM's
    engine = open_engine(
        smollm2, config, max_model_len=2000, num_gpu_blocks_override=blocks, block_size=16
    )
    prompt = [5] * 1900
    assert len(engine.generate([prompt], 2)["tokens"][0]) == 2
    with pytest.raises(RuntimeError, match="blocks of the KV cache by the request's own setting"):
        engine.generate([prompt], 1, extra_args=[{"lazyllm": "off"}])
