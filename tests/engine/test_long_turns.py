"""Long turns (``reuse: deep``): requests that go on and drop tokens of their own. What is kept,
what comes back and what is said are the slow reference's, whoever else asks."""

import pytest
import torch
from harness import agreement, families
from harness.going_on import (
    CONFIG,
    DOCUMENTS,
    MOST,
    NEW_TOKENS,
    OPTIONS,
    QUESTIONS,
    QUOTA,
    asked,
    goes_on,
)
from transformers import AutoModelForCausalLM

LONG = [DOCUMENTS[0] + DOCUMENTS[1][:n] for n in (130, 200, 280)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder, open_engine):
    arguments = folder, CONFIG, {"trace": True, "schedules_ahead": True}
    return open_engine(*arguments, max_num_batched_tokens=1200, **OPTIONS)


@pytest.mark.parametrize("budget, chunks", ((1200, 1), (90, 3)))
def test_it_drops_tokens_of_its_own(engine, folder, budget, chunks):
    """In one chunk and in several, in this turn and in the ones after it, short and long."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    document, turns = DOCUMENTS[0], [DOCUMENTS[1][:200], QUESTIONS[0]]
    engine.fresh(budget=budget)
    prompt, results = list(document), []
    for turn in (None, *turns):
        if turn is not None:
            prompt = prompt + results[-1]["tokens"][0] + turn
        results.append(engine.generate([prompt], NEW_TOKENS))
        assert results[-1]["free_blocks"][0] == results[-1]["free_blocks"][1]
        assert goes_on(results[-1]) == (turn is not None)
    assert len(results[1]["prefills"][0][-1]["chunks"]) == chunks
    seen = agreement.compare_turns(model, document, turns, CONFIG, QUOTA, results)
    seen.check(least_compared=0.9, most_ties=0)


def test_they_run_side_by_side(engine):
    """With each other, beside a turn that drops nothing, a whole prompt and decodes: as alone."""
    mine = [*LONG, DOCUMENTS[0] + QUESTIONS[0], DOCUMENTS[2]]
    decodes = [asked(DOCUMENTS[i][:n], params={"max_tokens": 30}) for i, n in ((1, 60), (2, 290))]
    alone = []
    for prompt in mine:
        engine.fresh()
        engine.generate([DOCUMENTS[0]], 1)
        alone.append(engine.run("serve", requests=[asked(prompt)]))
    assert [goes_on(result) for result in alone] == [True] * 4 + [False]
    for budget in (1200, 300):
        engine.fresh(budget=budget)
        engine.generate([DOCUMENTS[0]], 1)
        result = engine.run("serve", requests=[*decodes, *(asked(one, at=6) for one in mine)])
        assert result["free_blocks"][0] == result["free_blocks"][1]
        for i, single in enumerate(alone, len(decodes)):
            for what in ("tokens", "decodes"):
                assert result[what][i] == single[what][0], (budget, i, what)


def test_they_wait_for_places(engine):
    """While another one takes them: each brings back as much as alone."""
    requests, once = [asked(prompt) for prompt in LONG[:2]], []
    for some in ([requests[0]], [requests[1]], requests):
        engine.fresh()
        engine.generate([DOCUMENTS[0]], 1)
        engine.run("set_most_requests", count=5 if len(some) > 1 else MOST)
        once.append(engine.run("serve", requests=some))
    engine.run("set_most_requests", count=MOST)
    *alone, both = once
    assert both["finished"][1] > both["finished"][0]
    for what in ("tokens", "decodes"):
        assert both[what] == [one[what][0] for one in alone], what


@pytest.mark.parametrize("places, chunk", ((2, 0), (MOST, 9), (MOST, 1)))
def test_one_that_revives_nothing(engine, places, chunk):
    """It has no place but its own, or its last tokens do not come together: its own tokens are
    dropped all the same, and it revives as it decodes."""
    engine.fresh(chunk=chunk)
    engine.generate([DOCUMENTS[0]], 1)
    engine.run("set_places", count=places)
    result = engine.generate([LONG[1]], NEW_TOKENS)
    engine.run("set_places", count=MOST)
    assert goes_on(result)
    assert result["free_blocks"][0] == result["free_blocks"][1]
    own = [200, 120, 60, 40]
    (stats,) = result["stats"]
    assert stats["kept"] == [300 + own[0], 180 + own[1], 90 + own[2], 60 + own[3]]
    resident = result["prefills"][0][-1]["resident"]
    assert [len(resident[s]) for s in (1, 2, 3)] == stats["kept"][1:]
    assert sum(stats["revived"]) > 0


@pytest.mark.parametrize("at, goes_on_again", ((22, True), (34, False)))
def test_a_preempted_one_says_what_it_would_have_said(engine, at, goes_on_again):
    """Once its prompt has run. Before, nothing of it is left behind the first stage, nor of the
    document where others took its blocks: then it is pruned anew."""
    room, chunk = 94, 20
    turn = asked(LONG[0], at=at, params={"max_tokens": 20})
    other = asked(DOCUMENTS[2][:90], params={"max_tokens": 70})

    def run(*requests, document: bool = True, **fields) -> dict:
        engine.fresh(chunk=chunk, **fields)
        if document:
            engine.generate([DOCUMENTS[0]], 1)
        return engine.run("serve", requests=list(requests))

    alone = run(turn, document=goes_on_again)
    result = run(turn | {"priority": 1}, other, room=room)
    assert [one["said"] > 0 for one in result["preemptions"]] == [goes_on_again]
    assert goes_on(result) == goes_on(alone) == goes_on_again
    assert result["tokens"] == [alone["tokens"][0], run(other)["tokens"][0]]
    assert result["free_blocks"] == [room] * 2
