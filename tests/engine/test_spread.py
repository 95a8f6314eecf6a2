"""The later stages of a long prompt over several steps, beside requests that decode: nothing of its
answer changes, and nobody waits for more than stock vLLM does in a step."""

import random

import pytest
from harness import families

BUDGET, WINDOW, LAYERS = 32, 16, 6
CONFIG = {
    "prune": [{"layer": 1, "keep": 0.8}, {"layer": 3, "keep": 0.5}, {"layer": 4, "keep": 0.3}],
    "min_prompt_tokens": 60,
    "score_window": WINDOW,
    "score_pool": 3,
    "revive_budget": 0,
}
MODES = {"peak": {}, "mean": {"score": "mean"}, "strict": {"decode": "strict"}}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": 32,
    "max_model_len": 320,
    "max_num_seqs": 8,
}
RNG = random.Random(1)
SHORT = [[RNG.randrange(3, 1000) for _ in range(n)] for n in (3, 17, 40)]
# The last chunks of 12 tokens and of 1.
LONG = [[RNG.randrange(3, 1000) for _ in range(n)] for n in (220, 236, 291)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


class Engines:
    def __init__(self, expected: dict, spreading) -> None:
        self.expected, self.spreading = expected, spreading


@pytest.fixture(scope="module", params=MODES)
def engines(request, folder, open_engine):
    """What prompts say whole, cold and alone, and an engine with small steps, which are scheduled
    ahead."""
    config = CONFIG | MODES[request.param]
    off = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
    whole = open_engine(
        folder, config, {"trace": True}, max_num_batched_tokens=320, **OPTIONS, **off
    )
    expected = whole.generate(SHORT + LONG, 60, together=False)
    whole.close()
    given = {"trace": True, "schedules_ahead": True}
    spreading = open_engine(folder, config, given, max_num_batched_tokens=BUDGET, **OPTIONS)
    spreading.run("watch_steps")
    yield Engines(expected, spreading)
    spreading.close()


def asked(prompt: list[int], at: int, max_tokens: int, **more) -> dict:
    params = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return {"prompt": prompt, "at": at, "params": params, **more}


SHORT_ONES = [asked(prompt, 0, 60) for prompt in SHORT]


def assert_as_alone(result: dict, at: int, expected: dict, which: int) -> None:
    (tokens,) = result["tokens"][at]
    assert tokens == expected["tokens"][which][: len(tokens)]
    mine, theirs = result["prefills"][at][-1], expected["prefills"][which][-1]
    assert {k: v for k, v in mine.items() if k != "chunks"} == {
        k: v for k, v in theirs.items() if k != "chunks"
    }


def test_a_long_prompt_beside_decodes(engines):
    engine = engines.spreading
    engine.fresh()
    engine.run("steps")
    requests = SHORT_ONES + [asked(LONG[0], 6, 5), asked(LONG[2], 6, 5), asked(LONG[1], 8, 5)]
    result = engine.run("serve", requests=requests)
    for at, which in enumerate((0, 1, 2, 3, 5, 4)):
        assert_as_alone(result, at, engines.expected, which)
    steps = engine.run("steps")
    for step in steps:
        print(step)
    for step in steps:
        decodes = sum(n == 1 for n in step["tokens"].values())
        assert step["layer_rows"] <= BUDGET * LAYERS
