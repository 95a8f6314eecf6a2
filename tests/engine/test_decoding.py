"""Decoding of pruned prompts by the real engine: revival, batches, aborts, nothing lost."""

import random

import pytest
from transformers import AutoTokenizer

from benchmarks.passkey import passkey_prompt

PRUNE = [{"layer": 10, "keep": 0.5}, {"layer": 20, "keep": 0.25}]


@pytest.fixture(scope="module")
def noise():
    rng = random.Random(0)
    lengths = (1, 5, 128, 129, 300, 420, 560, 2, 480)
    return [[rng.randrange(200, 40000) for _ in range(n)] for n in lengths]


@pytest.fixture(scope="module")
def reviving(smollm2, open_engine):
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_reserve": 0.02}
    config |= {"revive_min_score": 0}
    return open_engine(smollm2, config)


def _assert_same(result, expected):
    assert result["tokens"] == expected["tokens"]
    for mine, theirs in zip(result["logprobs"], expected["logprobs"], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.keys() == b.keys()
            assert max(abs(a[t] - b[t]) for t in a) < 1e-3


def test_requests_without_room_go_on_without_selecting(reviving, noise):
    """The same answers as when every step selects, which a trace makes it do."""
    prompts = [p for p in noise if 256 <= len(p) <= 450]
    plain = reviving.generate(prompts, 32, logprobs=5)
    reviving.run("trace", on=True)
    selecting = reviving.generate(prompts, 32, logprobs=5)
    reviving.run("trace", on=False)
    assert len(plain["full"]) == len(prompts) and not selecting["full"]
    revived = [entry["revived"] for entry in plain["stats"]]
    assert sum(map(sum, revived)) > 0
    assert revived == [entry["revived"] for entry in selecting["stats"]]
    _assert_same(plain, selecting)


def test_an_explanation_tells_what_was_traced(reviving, smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt, _ = passkey_prompt(tokenizer, 400, seed=1, depth=0.5)
    reviving.run("trace", on=True)
    seen = reviving.run("explain", prompt=prompt, max_tokens=6)
    chat = reviving.run("explain_chat", text="Say </script>")
    reviving.run("trace", on=False)
    told, (prefill,), decodes = seen["explanation"], seen["prefills"], seen["decodes"]
    assert told["layers"] == [[1, 10], [11, 20], [21, 30]]
    assert told["kept"] == [list(range(len(prompt))), prefill[1], prefill[2]]
    assert len(told["steps"]) == len(decodes) == 5
    for step, traced in zip(told["steps"], decodes):
        for what in ("selected", "revived"):
            assert step[what] == [[], traced[1][what], traced[2][what]]
    assert any(any(step["revived"]) for step in told["steps"])
    for stage in (1, 2):  # the best were kept, of those that got so far
        places = [told["places"][stage][p] for p in prefill[stage]]
        assert sorted(places) == list(range(1, len(places) + 1))
        candidates = [p for p, place in enumerate(told["places"][stage]) if place]
        assert candidates == told["kept"][stage - 1]
    assert told["share_computed"] == pytest.approx(seen["stats"]["share_computed"])
    assert [token["id"] for token in told["prompt"]] == prompt
    assert [token["id"] for token in told["answer"]] == seen["tokens"]
    text = "".join(token["text"] for token in told["prompt"] + told["answer"])
    assert text == tokenizer.decode(prompt + seen["tokens"])
    text = "".join(token["text"] for token in chat["prompt"])
    assert "user\nSay </script><|im_end|>" in text and len(chat["answer"]) == 1
    assert chat["kept"] == [list(range(len(chat["prompt"])))] * 3, "too short to be pruned"


def test_aborted_requests_leave_nothing_behind(reviving, smollm2):
    """Also where prompts come in chunks, and are aborted in the middle of them."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [passkey_prompt(tokenizer, 400, seed=i, depth=0.5)[0] for i in range(5)]
    answers = []
    for budget in (4096, 150):
        reviving.run("reset_prefix_cache")
        reviving.run("set_budget", tokens=budget)
        result = reviving.run("abort", prompts=prompts, max_tokens=8)
        assert result["free_blocks"][0] == result["free_blocks"][1]
        finished = result["tokens"]
        assert {r for r, t in finished.items() if len(t) == 8} == {"r3", "r4"}
        assert len(finished.get("r0", [])) < 8 and len(finished.get("r1", [])) < 8
        answers.append([finished["r3"], finished["r4"]])
    # At most three decode at once, and each may revive as much as one alone.
    assert answers[0] == answers[1]


def test_a_trace_that_was_not_asked_for_is_said(reviving):
    with pytest.raises(RuntimeError, match="nothing was traced; set LAZYLLM_TRACE=1"):
        reviving.run("call_worker", method="lazyllm_trace")


def test_the_batch_does_not_matter(smollm2, open_engine, noise):
    """Without revival, whose quota depends on the batch, a request gets the same answer in a batch
    with others as by itself, whole or in chunks, with a cache or without."""
    config = {"prune": PRUNE, "min_prompt_tokens": 256, "revive_budget": 0, "decode": "strict"}
    engine = open_engine(smollm2, config)
    prompts = [p for p in noise if len(p) >= 128]
    together = engine.generate(prompts, 6, logprobs=5)
    alone = engine.generate(prompts, 6, logprobs=5, together=False)
    assert not any(together["cached"]) and sum(alone["cached"]) > len(prompts) * 128
    _assert_same(together, alone)
    engine.run("reset_prefix_cache")
    engine.run("set_budget", tokens=190)
    _assert_same(engine.generate(prompts, 6, logprobs=5), alone)
