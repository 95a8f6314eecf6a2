"""The later stages of a long prompt over several steps, beside requests that decode: its answer is
the same, and nobody waits for more than stock vLLM does in a step."""

import random

import pytest
from harness import families

BUDGET, WINDOW, LAYERS, FIRST_STAGE = 32, 16, 6, 1
CONFIG = {
    "prune": [
        {"layer": FIRST_STAGE, "keep": 0.8},
        {"layer": 3, "keep": 0.5},
        {"layer": 4, "keep": 0.3},
    ],
    "min_prompt_tokens": 60,
    "score_window": WINDOW,
    "score_pool": 3,
    "revive_budget": 0,
}
MODES = {"peak": {}, "mean": {"score": "mean", "decode": "strict"}}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": 32,
    "max_model_len": 320,
    "max_num_seqs": 8,
}
RNG = random.Random(1)
SHORT = [[RNG.randrange(3, 1000) for _ in range(n)] for n in (3, 17, 40)]
LONG = [[RNG.randrange(3, 1000) for _ in range(n)] for n in (220, 291, 236)]
MANY, FEW = 48, 4  # tokens of an answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


class Engines:
    """Attributes:
    short, long: what the prompts give whole and cold, the long ones alone.
    engine: has small steps, each scheduled while the one before runs.
    """

    def __init__(self, mode: str, folder, open_engine) -> None:
        config, off = CONFIG | MODES[mode], {"enable_chunked_prefill": False}
        off |= {"enable_prefix_caching": False, "max_num_batched_tokens": 320}
        whole = open_engine(folder, config, {"trace": True}, **OPTIONS, **off)
        self.short = whole.generate(SHORT, MANY)
        self.long = whole.generate(LONG, FEW, together=False)
        whole.close()
        given = {"trace": True, "schedules_ahead": True}
        self.engine = open_engine(folder, config, given, max_num_batched_tokens=BUDGET, **OPTIONS)
        self.engine.run("watch_steps")

    def serve(self, requests: list[dict]) -> tuple[dict, list[dict]]:
        """What comes of requests in an empty cache, and the steps that it took."""
        self.engine.fresh()
        self.engine.run("steps")
        result = self.engine.run("serve", requests=requests)
        assert result["free_blocks"][0] == result["free_blocks"][1]
        return result, self.engine.run("steps")

    def check_long(self, result: dict, at: int, which: int) -> None:
        """That a request kept and said what its long prompt does alone."""
        assert result["tokens"][at] == [self.long["tokens"][which]]
        mine, theirs = result["prefills"][at][-1], self.long["prefills"][which][-1]
        assert {k: v for k, v in mine.items() if k != "chunks"} == {
            k: v for k, v in theirs.items() if k != "chunks"
        }


@pytest.fixture(scope="module", params=MODES)
def engines(request, folder, open_engine):
    engines = Engines(request.param, folder, open_engine)
    yield engines
    engines.engine.close()


def asked(prompt: list[int], max_tokens: int, at: int = 0) -> dict:
    params = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    return {"prompt": prompt, "params": params, "at": at}


SHORT_ONES = [asked(prompt, MANY) for prompt in SHORT]


def test_beside_decodes(engines):
    """Prompts that come at once and one after the other. All of them together, without spreading,
    would take steps of up to 3 times as many layer-rows."""
    long_ones = [asked(prompt, FEW, at) for prompt, at in zip(LONG, (6, 6, 8))]
    result, steps = engines.serve(SHORT_ONES + long_ones)
    assert result["tokens"][: len(SHORT)] == [[tokens] for tokens in engines.short["tokens"]]
    for which in range(len(LONG)):
        engines.check_long(result, len(SHORT) + which, which)
        # Chunks, as the trace has them; then the last token again; then the answer's.
        chunks = result["prefills"][len(SHORT) + which][-1]["chunks"]
        again = len(result["computed"][len(SHORT) + which]) - len(chunks) - (FEW - 1)
        assert again >= 2, "nothing was spread: the test shows nothing"
    assert max(step["layer_rows"] for step in steps) <= BUDGET * LAYERS
    short_names = list(steps[0]["tokens"])
    assert len(short_names) == len(SHORT)
    for step in steps:
        if step["tokens"].keys() - short_names:
            assert [step["tokens"].get(name) for name in short_names[1:]] == [1] * 2


@pytest.mark.parametrize("engines", ["peak"], indirect=True)
def test_a_cached_prompt_that_is_not_pruned(engines):
    """The later stages must run what a pruned prompt left of the first: no more of it in a step
    than the step has tokens. At once it would be 5 times as many layer-rows."""
    request = asked(LONG[0], FEW)
    request["params"]["extra_args"] = {"lazyllm": "off"}
    cold, _ = engines.serve([request])
    engines.serve([asked(LONG[0], FEW)])  # which leaves the first stage alone
    found, decode = 192, asked(SHORT[0], MANY)
    result = engines.engine.run("serve", requests=[decode, request | {"at": 4}])
    steps = engines.engine.run("steps")
    assert result["found"][1] == [found] and result["computed"][1][:7] == [4] * 7
    assert result["tokens"] == [[engines.short["tokens"][0]], cold["tokens"][0]]
    mine, theirs = (each["prefills"][at][-1] for each, at in ((result, 1), (cold, 0)))
    assert len(mine["chunks"]) == 7 and mine | {"chunks": theirs["chunks"]} == theirs
    assert max(step["layer_rows"] for step in steps) <= BUDGET * LAYERS < found * LAYERS / 5


@pytest.mark.parametrize("engines", ["peak"], indirect=True)
def test_decodes_that_end_meanwhile(engines):
    """The rest runs by itself, or beside a chunk of another prompt, whose own later stages do not
    run yet."""
    beside_a_chunk = 0
    for max_tokens in (10, 11):
        requests = [asked(SHORT[0], max_tokens), asked(LONG[0], FEW), asked(LONG[1], FEW)]
        result, steps = engines.serve(requests)
        for which in range(2):
            engines.check_long(result, 1 + which, which)
        for step in steps:
            tokens = sorted(step["tokens"].values())
            assert len(tokens) == 1 or step["layer_rows"] <= BUDGET * LAYERS
            if len(tokens) == 2 and tokens[0] == 1 < tokens[1]:
                beside_a_chunk += step["layer_rows"] > LAYERS + tokens[1] * FIRST_STAGE
    assert beside_a_chunk


def test_alone(engines):
    """There is nobody to wait: no step more than its chunks and its answer take."""
    result, steps = engines.serve([asked(LONG[1], FEW)])
    engines.check_long(result, 0, 1)
    assert len(steps) == -(-len(LONG[1]) // BUDGET) + FEW - 1


@pytest.mark.parametrize("engines", ["peak"], indirect=True)
@pytest.mark.parametrize("how", ("abort", "preempt", "reset"))
def test_interrupted_halfway(engines, how):
    """All blocks come back, and answers are right: those of others, and of the same prompt, then or
    when it comes again."""
    engine = engines.engine
    engine.fresh()
    requests = SHORT_ONES + [asked(LONG[1], FEW)]
    result = engine.run("interrupt", requests=requests, how=how)
    assert result["free_blocks"][0] == result["free_blocks"][1]
    assert result["interrupted"] == len(SHORT)
    assert 0 < sum(result["ran"][1:])
    assert result["tokens"][:-1] == engines.short["tokens"] or how == "reset"
    assert result["tokens"][-1] == (None if how == "abort" else engines.long["tokens"][1])
    again = engine.run("serve", requests=requests[-1:])
    engines.check_long(again, 0, 1)
