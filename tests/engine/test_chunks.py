"""Prompts in chunks, and prompts that share what was computed for others: the real engine gives the
answers, and keeps the tokens, that it does for the whole, cold prompt."""

import random

import pytest
from harness import families
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

BLOCK, WINDOW, TOKENS = 32, 16, 6
CONFIG = {
    "prune": [{"layer": 1, "keep": 0.6}, {"layer": 2, "keep": 0.3}, {"layer": 4, "keep": 0.2}],
    "min_prompt_tokens": 60,
    "score_window": WINDOW,
    "score_pool": 3,
}
MODES = {
    "resident": {"revive_budget": 0},
    "mean": {"revive_budget": 0, "score": "mean"},
    "strict": {"revive_budget": 0, "decode": "strict"},
    "reviving": {"revive_budget": 8, "revive_per_request": 4, "revive_min_score": 0},
}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": BLOCK,
    "max_model_len": 320,
    "max_num_seqs": 8,
}
LENGTHS = (1, 2, 16, 17, 59, 60, 64, 65, 90, 130, 200)
RNG = random.Random(0)
DOCUMENTS = [[RNG.randrange(3, 1000) for _ in range(max(LENGTHS))] for _ in range(2)]
# Beginnings of two documents, alone and with another end.
PROMPTS = [document[:n] for document in DOCUMENTS for n in LENGTHS]
PROMPTS += [DOCUMENTS[0][:n] + DOCUMENTS[1][:m] for n, m in ((48, 20), (130, 5), (170, 30))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


class Engines:
    def __init__(self, mode: str, expected: dict, chunked) -> None:
        self.mode, self.expected, self.chunked = mode, expected, chunked


@pytest.fixture(scope="module", params=MODES)
def engines(request, folder, open_engine):
    """One that has prompts whole and cold, what it makes of all prompts, and one with chunks and a
    cache, whose steps can be made smaller."""
    config, trace = CONFIG | MODES[request.param], {"trace": True}
    off = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    whole = open_engine(folder, config, trace, max_num_batched_tokens=320, **OPTIONS, **off)
    expected = whole.generate(PROMPTS, TOKENS, logprobs=2, together=False)
    whole.close()
    chunked = open_engine(folder, config, trace, max_num_batched_tokens=64, **OPTIONS)
    yield Engines(request.param, expected, chunked)
    chunked.close()


def assert_as_whole(expected: dict, result: dict, which: list[int]) -> None:
    for at, i in enumerate(which):
        where = f"prompt {i}, {len(PROMPTS[i])} tokens, {result['prefills'][at][-1]['chunks']}"
        (mine, theirs) = (r["prefills"][k][-1] for r, k in ((result, at), (expected, i)))
        assert {k: v for k, v in mine.items() if k != "chunks"} == {
            k: v for k, v in theirs.items() if k != "chunks"
        }, where
        assert result["tokens"][at] == expected["tokens"][i], where
        for a, b in zip(result["logprobs"][at], expected["logprobs"][i], strict=True):
            assert all(abs(a[token] - b[token]) < 1e-3 for token in a.keys() & b.keys()), where


@given(
    which=st.lists(st.integers(0, len(PROMPTS) - 1), min_size=1, max_size=6),
    budget=st.sampled_from((9, 16, 23, 33, 48, 64)),
    together=st.booleans(),
    is_cold=st.booleans(),
)
@settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_chunks_and_hits_change_nothing(engines, which, budget, together, is_cold):
    """Any prompts, in steps of any size, after any others."""
    expected, chunked = engines.expected, engines.chunked
    # How many tokens a request may revive, and in strict decoding its sight, is a batch's matter.
    together = together and engines.mode != "reviving"
    if is_cold:
        chunked.run("reset_prefix_cache")
    chunked.run("set_budget", tokens=budget)
    prompts = [PROMPTS[i] for i in which]
    result = chunked.generate(prompts, TOKENS, logprobs=2, together=together)
    assert result["free_blocks"][0] == result["free_blocks"][1]
    assert_as_whole(expected, result, which)


def test_hits_are_stock_vllms(folder, open_engine):
    """Less what the window must run again; generated tokens included."""
    stock = open_engine(folder, max_num_batched_tokens=64, **OPTIONS)
    ours = open_engine(folder, CONFIG, max_num_batched_tokens=64, **OPTIONS)
    hits = {}
    for engine in (ours, stock):
        said = engine.generate(PROMPTS, TOKENS, together=False)["tokens"]
        # Conversations go on: the prompt, its answer, and some more; and a prompt comes again.
        turns = [p + answer + DOCUMENTS[1][50:60] for p, answer in zip(PROMPTS, said)]
        hits[engine] = engine.generate(turns + PROMPTS, 1, together=False)["cached"]
        engine.close()
    for prompt, mine, theirs in zip(turns + PROMPTS, hits[ours], hits[stock], strict=True):
        most = len(prompt) - (WINDOW if len(prompt) >= CONFIG["min_prompt_tokens"] else 1)
        assert mine == min(theirs, most // BLOCK * BLOCK), len(prompt)
    assert sum(mine > 0 for mine in hits[ours]) > len(PROMPTS)


def test_little_room(folder, open_engine):
    """Cached prefixes are evicted and requests preempted: answers right, no block lost."""
    config = CONFIG | {"revive_budget": 0}
    options = OPTIONS | {"max_num_batched_tokens": 64}
    roomy = open_engine(folder, config, **options)
    tight = open_engine(folder, config, num_gpu_blocks_override=60, **options)
    prompts = [DOCUMENTS[n % 2][: 100 + 10 * n] for n in range(8)]
    expected = roomy.generate(prompts, 60, together=False)
    for _ in range(2):
        result = tight.generate(prompts, 60)
        assert result["free_blocks"][0] == result["free_blocks"][1]
        assert result["preemptions"] > 0
        # What is preempted is prefilled again with what it had said, and may say something else.
        same = sum(a == b for a, b in zip(result["tokens"], expected["tokens"]))
        assert same >= len(prompts) - result["preemptions"]
    for engine in (roomy, tight):
        engine.close()
