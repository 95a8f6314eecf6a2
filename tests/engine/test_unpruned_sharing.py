"""Prompts that are not pruned share the keys of all stages, as in stock vLLM; and with ``reuse:
deep`` one that would be pruned goes on from them."""

import random

import pytest
from harness import families

BLOCK, BUDGET, LEAST = 32, 96, 160
CONFIG = {
    "prune": [{"layer": 1, "keep": 0.6}, {"layer": 2, "keep": 0.3}, {"layer": 4, "keep": 0.2}],
    "min_prompt_tokens": LEAST,
    "score_window": 8,
    "score_pool": 3,
    "reuse": "deep",
}
OPTIONS = {
    "skip_tokenizer_init": True,
    "block_size": BLOCK,
    "max_model_len": 640,
    "max_num_seqs": 8,
    "max_num_batched_tokens": BUDGET,
}
RNG = random.Random(0)
DOCUMENT, OTHER = ([RNG.randrange(3, 1000) for _ in range(400)] for _ in range(2))
REUSES = ("exact", "deep")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def ours(folder, open_engine):
    engine = open_engine(folder, CONFIG, {"schedules_ahead": True}, **OPTIONS)
    engine.run("watch_steps")
    return engine


@pytest.fixture(scope="module")
def stock(folder, open_engine):
    return open_engine(folder, **OPTIONS)


def ask(engine, prompt: list[int], reuse: str | None = None, **params) -> dict:
    """``serve``'s answer; of an engine with LazyLLM also ``rows``, of each stage until the first
    token, and whether all steps until then were ``plain``."""
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 8} | params
    if reuse:
        params["extra_args"] = {"lazyllm_reuse": reuse}
        engine.run("steps")
    result = engine.run("serve", requests=[{"prompt": prompt, "params": params}])
    assert result["free_blocks"][0] == result["free_blocks"][1]
    if reuse:
        chunks = len(result["computed"][0]) - (params["max_tokens"] - 1)
        steps = engine.run("steps")[:chunks]
        result["rows"] = [sum(of_stage) for of_stage in zip(*(step["rows"] for step in steps))]
        result["plain"] = all(step["is_plain"] for step in steps)
    return result


def blocks(count: int) -> int:
    """Of so many tokens those in full blocks."""
    return count // BLOCK * BLOCK


@pytest.mark.parametrize("reuse", REUSES)
def test_a_short_conversation_runs_its_new_tokens_alone(ours, stock, reuse):
    """In every stage, as vLLM gives them, and with stock vLLM's answers."""
    ours.fresh()
    stock.fresh()
    prompt, known = DOCUMENT[:70], 0
    for more in (5, 30, 1, 0):
        mine, theirs = ask(ours, prompt, reuse), ask(stock, prompt)
        assert mine["tokens"] == theirs["tokens"] and mine["found"] == theirs["found"]
        assert mine["found"] == [[known]]
        assert mine["rows"] == [len(prompt) - known] * 4 and mine["plain"]
        said = mine["tokens"][0][0]
        known = blocks(len(prompt) + len(said) - 1)
        prompt = prompt + said + OTHER[:more]
    assert len(prompt) < LEAST


@pytest.mark.parametrize("reuse", REUSES)
def test_who_comes_after_a_pruned_prompt_catches_up_once(ours, stock, reuse):
    """That one left the first stage's keys alone. The next who asks finds what the first left who
    was not pruned."""
    ours.fresh()
    stock.fresh()
    assert ask(ours, DOCUMENT[:200], reuse)["rows"][3] < 200
    for i, known in enumerate((0, 128)):
        prompt = DOCUMENT[:130] + OTHER[i : i + 9]
        mine, theirs = ask(ours, prompt, reuse), ask(stock, prompt)
        assert mine["tokens"] == theirs["tokens"]
        assert mine["found"] == [[128]] and mine["rows"] == [11] + [139 - known] * 3
        assert mine["plain"] == (known > 0)


def ask_off(ours, stock, reuse: str, prompts: list[list[int]], at: tuple[int, ...]) -> dict:
    """The answers of both to requests that ask not to be pruned and come after so many steps, which
    are the same."""
    params = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}
    asked = [{"prompt": p, "params": params, "at": n} for p, n in zip(prompts, at, strict=True)]
    theirs = stock.run("serve", requests=asked)
    for one in asked:
        one["params"] = params | {"extra_args": {"lazyllm": "off", "lazyllm_reuse": reuse}}
    mine = ours.run("serve", requests=asked)
    assert mine["tokens"] == theirs["tokens"]
    return mine


@pytest.mark.parametrize("reuse", REUSES)
def test_nobody_reads_what_has_not_run(ours, stock, reuse):
    """Where more is to be caught up with than a step has tokens: three who ask at about the same
    time for what a pruned prompt left of the first stage."""
    ours.fresh()
    stock.fresh()
    ask(ours, DOCUMENT[:200], reuse)
    prompts = [DOCUMENT[:190] + OTHER[:n] for n in (10, 40, 25)]
    mine = ask_off(ours, stock, reuse, prompts, (0, 0, 1))
    assert mine["found"][0] == [blocks(190)]


@pytest.mark.parametrize("reuse", REUSES)
def test_nobody_catches_up_on_what_runs_in_the_same_step(ours, stock, reuse):
    """After a pruned prompt, two at once: the first catches up with 96 tokens and runs 32. The
    other finds more of the first stage, and catches up before those 32 have run."""
    ours.fresh()
    stock.fresh()
    ask(ours, DOCUMENT[:200], reuse)
    mine = ask_off(ours, stock, reuse, [DOCUMENT[:128], DOCUMENT[:200]], (0, 0))
    assert mine["found"] == [[96], [192]]


def test_a_prompt_goes_on_from_those_that_were_not_pruned(ours, stock):
    """Where it would be pruned, and ``reuse`` is ``deep``, and few tokens are left: then all of its
    tokens have keys, and its answer is stock vLLM's. Its statistics tell."""
    for reuse in REUSES:
        ours.fresh()
        stock.fresh()
        first = ask(ours, DOCUMENT[:150], reuse)
        prompt = DOCUMENT[:150] + first["tokens"][0][0] + OTHER[:20]
        assert ask(stock, DOCUMENT[:150])["tokens"] == first["tokens"]
        mine, theirs = ask(ours, prompt, reuse), ask(stock, prompt)
        (stats,) = mine["stats"]
        known = mine["found"][0][0]
        assert known == blocks(150 + 8 - 1)
        if reuse == "deep":
            assert mine["tokens"] == theirs["tokens"] and mine["plain"]
            assert stats["kept"] == [len(prompt)] * 4 and stats["reused"] == known
            assert mine["rows"] == [len(prompt) - known] * 4
        else:
            assert stats["kept"][-1] < 60 and stats["reused"] == 0


def test_it_is_pruned_where_that_takes_less(ours):
    """With many more tokens, and where nobody was before it."""
    for more, is_pruned in ((20, False), (150, True)):
        ours.fresh()
        ask(ours, DOCUMENT[:150], "deep")
        (stats,) = ask(ours, DOCUMENT[:150] + OTHER[:more], "deep")["stats"]
        assert (stats["kept"][-1] < 100) == is_pruned
    ours.fresh()
    (stats,) = ask(ours, DOCUMENT[:170], "deep")["stats"]
    assert stats["kept"][-1] < 100


def test_layers_with_a_window_too(tmp_path_factory, open_engine):
    """In a model where two layers of three have one, of 64 tokens: stock vLLM's answers."""
    folder = families.save_tiny("gemma3", tmp_path_factory.mktemp("gemma3"))
    config = CONFIG | {"prune": [{"layer": 3, "keep": 0.5}, {"layer": 6, "keep": 0.2}]}
    config["min_prompt_tokens"] = 400
    mine, theirs = open_engine(folder, config, **OPTIONS), open_engine(folder, **OPTIONS)
    prompt, known = DOCUMENT[:100], 0
    for more in (5, 30, 1, 60, 0):
        found, expected = (engine.generate([prompt], 8) for engine in (mine, theirs))
        assert found["tokens"] == expected["tokens"] and found["cached"] == [known]
        said = expected["tokens"][0]
        known, prompt = blocks(len(prompt) + len(said) - 1), prompt + said + OTHER[:more]
