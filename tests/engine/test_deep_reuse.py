"""Requests that go on from what others left behind their first stage (``reuse: deep``): the slow
reference's answers, whoever else asks, and none but their own where it is not theirs to take."""

import pytest
import torch
from harness import agreement, families
from harness.going_on import (
    BLOCK,
    CONFIG,
    DOCUMENTS,
    NEW_TOKENS,
    OPTIONS,
    QUESTIONS,
    QUOTA,
    asked,
    goes_on,
)
from transformers import AutoModelForCausalLM

BUDGET = 128  # tokens a step


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.save_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def engine(folder, open_engine):
    arguments = folder, CONFIG, {"trace": True, "schedules_ahead": True}
    return open_engine(*arguments, max_num_batched_tokens=BUDGET, **OPTIONS)


def test_a_conversation_is_the_references(engine, folder):
    """Each turn goes on from the one before, in one chunk and in many, of which the first end where
    the later stages have run already."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    turns, said = QUESTIONS[:2], []
    for budget, chunks in ((BUDGET, 1), (18, 4)):
        engine.fresh()
        prompt, results = list(DOCUMENTS[0]), []
        for turn in (None, *turns):
            if turn is not None:
                engine.run("set_budget", tokens=budget)
                prompt = prompt + results[-1]["tokens"][0] + turn
            results.append(engine.generate([prompt], NEW_TOKENS))
            assert results[-1]["free_blocks"][0] == results[-1]["free_blocks"][1]
            assert goes_on(results[-1]) == (turn is not None)
        assert len(results[1]["prefills"][0][-1]["chunks"]) == chunks
        said.append([result[what] for result in results for what in ("tokens", "decodes")])
    assert said[0] == said[1]
    seen = agreement.compare_turns(model, DOCUMENTS[0], turns, CONFIG, QUOTA, results)
    seen.check(least_compared=0.9, most_ties=0)


def test_a_turn_in_a_graph_is_the_same_turn(engine):
    """Padded as for a CUDA graph, alone and beside decodes, with tokens before those that score
    and without: kept sets and tokens as without padding, whatever ran in the step before."""
    # Of 300 tokens 288 are shared: 52, 16, 102 and 33 run.
    prompts = [DOCUMENTS[0] + QUESTIONS[2][:n] for n in (40, 4, 90, 21)]
    decodes = [asked(DOCUMENTS[i][:n], params={"max_tokens": 40}) for i, n in ((1, 60), (2, 300))]
    results = []
    for _ in range(2):
        engine.fresh()
        engine.generate([DOCUMENTS[0]], 1)
        alone = [engine.generate([prompt], NEW_TOKENS) for prompt in prompts]
        turns = [asked(prompt, at=12 + 3 * i) for i, prompt in enumerate(prompts[:3])]
        beside = [engine.run("serve", requests=[*decodes, *turns])]
        assert all(goes_on(result) for result in alone)
        assert all(goes_on(beside[0], i) for i in (2, 3, 4))
        # In one step: two, three, which have the graph of four, and so beside decodes.
        for count, others in ((2, []), (3, []), (3, decodes)):
            first = 12 if others else 0
            turns = [asked(prompts[i], at=first) for i in (0, 1, 3)[:count]]
            beside.append(engine.run("serve", requests=[*others, *turns]))
            assert all(goes_on(beside[-1], len(others) + i) for i in range(count))
        results.append((alone, beside))
        if len(results) == 1:
            engine.run("run_turns_as_in_graphs")
    shapes = engine.run("turns_as_in_graphs")
    engine.run("run_turns_as_in_graphs", graphs=False)
    # One that is too long for a graph of its own has that of more.
    assert shapes[:4] == [(1, 0, 64), (1, 0, 16), (4, 0, 110), (1, 0, 33)]
    assert shapes[4:6] == [(1, 4, 64), (1, 4, 16)]
    assert shapes[6:] == [(2, 0, 80), (4, 0, 110), (4, 2, 120)]
    for what in ("tokens", "prefills", "decodes", "free_blocks"):
        plain, padded = ([one[what] for one in (*alone, *beside)] for alone, beside in results)
        assert plain == padded, what


def test_questions_about_one_document_do_not_disturb_each_other(engine):
    """Each answer is that of the question alone, in whatever order and company they come."""
    prompts = [DOCUMENTS[0] + question for question in QUESTIONS]
    singly = []
    for prompt in prompts:
        engine.fresh()
        engine.generate([DOCUMENTS[0]], 1)
        singly.append(engine.generate([prompt], NEW_TOKENS))
        assert goes_on(singly[-1])
    engine.fresh()
    engine.generate([DOCUMENTS[0]], 1)
    for order in ((0, 1, 2, 3, 4), (3, 1, 4, 0, 2)):
        result = engine.generate([prompts[i] for i in order], NEW_TOKENS, together=order[0] == 0)
        assert all(goes_on(result, i) for i in range(5))
        assert result["free_blocks"][0] == result["free_blocks"][1]
        for at, i in enumerate(order):
            assert result["tokens"][at] == singly[i]["tokens"][0]


def test_no_more_than_eight_begin_in_one_step(engine):
    """The others in the next; each brings back as much as alone."""
    prompts = [DOCUMENTS[0] + [3 + i, *QUESTIONS[1]] for i in range(10)]
    once = {"max_tokens": 1}
    engine.fresh()
    engine.run("set_budget", tokens=512)
    engine.generate([DOCUMENTS[0]], 1)
    alone = [engine.run("serve", requests=[asked(prompt, params=once)]) for prompt in prompts]
    result = engine.run("serve", requests=[asked(prompt, params=once) for prompt in prompts])
    assert all(goes_on(result, i) for i in range(10))
    first, last = min(result["finished"]), max(result["finished"])
    assert last == first + 1 and result["finished"].count(first) == 8
    for what in ("tokens", "prefills", "decodes"):
        assert result[what] == [one[what][0] for one in alone], what


def test_what_is_shared_is_never_written(engine):
    """Neither by those who go on from it, decode and revive, nor by those who go on from them."""
    engine.fresh()
    engine.generate([DOCUMENTS[0]], 1)
    # Tokens that stages 1 to 3 keep, and their layers, each of which is a group.
    kept, layers = (180, 90, 60), (1, 2, 2)
    shared = engine.run("shared_blocks")
    assert len(shared) == sum(count // BLOCK * each for count, each in zip(kept, layers))
    contents = engine.run("block_contents", blocks=shared)
    assert len(set(contents)) == len(shared)
    prompts = [DOCUMENTS[0] + question for question in QUESTIONS]
    first = engine.generate(prompts, NEW_TOKENS)
    again = [prompt + said + QUESTIONS[1] for prompt, said in zip(prompts, first["tokens"])]
    second = engine.generate(again, NEW_TOKENS)
    for result in (first, second):
        assert all(goes_on(result, i) for i in range(5))
        assert all(sum(one["revived"]) > 0 for one in result["stats"])
    assert engine.run("block_contents", blocks=shared) == contents
    assert set(shared) < set(engine.run("shared_blocks"))


def test_turns_run_side_by_side_if_there_are_places(engine):
    """Among decodes and whole prompts of all of which something is asked, or one after the other:
    the answers are the same. With no place but their own, the last token runs on its own."""
    mine, others = [DOCUMENTS[0] + question for question in QUESTIONS[:2]], DOCUMENTS[2]
    decodes = asked(others[:60], params={"max_tokens": 12})
    whole = asked(others[60:100], at=4, params={"max_tokens": 1, "prompt_logprobs": 0})
    requests = [decodes, *(asked(prompt, at=4) for prompt in mine), whole]
    engine.fresh()
    engine.run("set_budget", tokens=512)
    alone = [engine.run("serve", requests=[one | {"at": 0}]) for one in (decodes, whole)]
    results = {}
    for most, last in ((4, [1]), (7, []), (16, [])):
        engine.fresh()
        engine.run("set_budget", tokens=512)
        engine.generate([DOCUMENTS[0]], 1)
        engine.run("set_most_requests", count=most)
        result = results[most] = engine.run("serve", requests=requests)
        assert all(goes_on(result, i) for i in (1, 2))
        for i in (1, 2):
            new = len(requests[i]["prompt"]) - result["found"][i][0]
            assert result["computed"][i][: 1 + len(last)] == [new - len(last), *last]
        assert result["tokens"][0] == alone[0]["tokens"][0]
        assert result["tokens"][3] == alone[1]["tokens"][0]
        given, right = result["prompt_logprobs"][3], alone[1]["prompt_logprobs"][0]
        assert given == pytest.approx(right, abs=1e-4) and len(given) == 39
    for what in ("tokens", "prefills", "decodes"):
        assert results[16][what][1:3] == results[7][what][1:3], what


def test_a_turn_without_room_is_pruned_anew(engine):
    """A prompt has room for what eight turns bring back. The ninth that goes on from them finds
    none, and begins again with room for eight more."""
    engine.fresh()
    prompt, went_on = list(DOCUMENTS[0]), []
    for _ in range(11):
        result = engine.generate([prompt], 2)
        went_on.append(goes_on(result))
        prompt = prompt + result["tokens"][0] + QUESTIONS[1]
    assert went_on == [False, *[True] * 8, False, True]


def test_a_step_too_many_is_no_loss(engine):
    """vLLM learns that an answer ended when the next step is on its way, in which its last token
    runs and revives. The next turn is that of an answer that was asked to be one token longer."""
    engine.fresh()
    said = engine.generate([DOCUMENTS[0]], NEW_TOKENS)["tokens"][0]
    stop = max(i for i in range(NEW_TOKENS - 1) if said.index(said[i]) == i)
    engine.fresh()
    engine.generate([DOCUMENTS[0]], stop + 2)
    turn = asked(DOCUMENTS[0] + said[: stop + 1] + QUESTIONS[0])
    longer = engine.run("serve", requests=[turn])
    engine.fresh()
    stops = asked(DOCUMENTS[0], params={"stop_token_ids": [said[stop]]})
    assert engine.run("serve", requests=[stops])["tokens"] == [[said[: stop + 1]]]
    stopped = engine.run("serve", requests=[turn])
    for what in ("tokens", "prefills", "decodes"):
        assert stopped[what] == longer[what]
    assert [one["stats"][0]["reused"] for one in (stopped, longer)] == [301 + stop] * 2


def test_what_a_request_may_take(engine):
    """Not what has another salt or setting, nor was there before a reset; and not what is shorter
    than half the prompt. A request may ask for less than the server offers."""
    engine.fresh()
    first, second = asked(DOCUMENTS[0], params={"max_tokens": 1}), DOCUMENTS[0] + QUESTIONS[0]
    second, too_long = asked(second), asked(DOCUMENTS[0] + DOCUMENTS[1] + QUESTIONS[0][:1])

    def serve(request, salt=None, **extra) -> dict:
        salted = {"cache_salt": salt} if salt else {}
        params = request["params"] | {"extra_args": extra or None}
        return engine.run("serve", requests=[request | salted | {"params": params}])

    serve(first, "a")
    for extra in ({"lazyllm_keep": 1.2}, {"lazyllm_revive": "off"}):
        assert not goes_on(serve(second, "a", **extra))
    serve(first, "d")  # for one that leaves the keys of all stages
    assert not goes_on(serve(second, "d", lazyllm="off"))
    exact = serve(second, "a", lazyllm_reuse="exact")
    assert not goes_on(exact) and exact["found"] == [[320]]
    off = serve(second, "a", lazyllm_reuse="off")
    assert not goes_on(off) and off["found"] == [[0]]
    assert off["tokens"] == exact["tokens"] == serve(second, "b")["tokens"]
    deep = serve(second, "a")
    assert goes_on(deep) and deep["tokens"] != exact["tokens"]
    assert not goes_on(serve(second, "c"))
    assert not goes_on(serve(too_long, "a"))
    assert engine.run("reset_prefix_cache")
    assert not goes_on(serve(second, "a"))
    assert engine.run("snapshots") == 1


SEEN = ("tokens", "cached", "found", "computed", "finished", "prefills", "decodes", "stats")


def seen(engine, prompt: list[int], salt: str, reuse: str) -> dict:
    """All that a tenant could tell by who was there before: its answer, what it found, its tokens
    in each step and how many steps it took, what was kept and revived, and its statistics."""
    params = {"extra_args": {"lazyllm_reuse": reuse}, "max_tokens": 3}
    result = engine.run("serve", requests=[asked(prompt, params=params) | {"cache_salt": salt}])
    stats = [{k: v for k, v in one.items() if k != "request_id"} for one in result["stats"]]
    return {what: result[what] for what in SEEN} | {"stats": stats}


@pytest.mark.parametrize("reuse, room", (("deep", None), ("deep", 64), ("exact", None)))
def test_a_tenant_learns_nothing_of_another(engine, reuse, room):
    """Who asks what another asked, or goes on from it, is served as if nobody had been there, also
    where the other's leavings fill the cache. Who has been there itself is not: this would see
    it."""
    first = DOCUMENTS[0]
    engine.fresh(room)
    alone = [seen(engine, first, "b", reuse)]
    second = first + alone[0]["tokens"][0][0] + QUESTIONS[0]
    alone.append(seen(engine, second, "b", reuse))
    engine.fresh(room)
    cold = seen(engine, second, "c", reuse)
    for what in ("cached", "found", "computed", "finished", "prefills"):
        assert cold[what] != alone[1][what], what
    assert cold["cached"] == [0]

    engine.fresh(room)
    assert [seen(engine, prompt, "a", reuse) for prompt in (first, second)] == alone
    assert (engine.run("snapshots") > 0) == (reuse == "deep")
    assert seen(engine, second, "c", reuse) == cold
    assert [seen(engine, prompt, "b", reuse) for prompt in (first, second)] == alone


@pytest.mark.parametrize("room", (64, 100))
def test_snapshots_give_way(engine, room):
    """Where prompts push each other's snapshots out, nobody waits for blocks and none is lost."""
    engine.fresh(room)
    requests, questions = [], []
    for i, which in enumerate((0, 0, 1, 0, 2)):
        requests.append(asked(DOCUMENTS[which], at=6 * i, params={"max_tokens": 1}))
        questions.append(asked(DOCUMENTS[which] + QUESTIONS[i], at=6 * i + 4))
    result = engine.run("serve", requests=requests + questions)
    assert result["free_blocks"] == [room] * 2
    went_on = [goes_on(result, i) for i in range(len(requests), 2 * len(requests))]
    assert set(went_on) == {True, False}
    engine.fresh()
    assert engine.run("snapshots") == 0


def test_a_preempted_request_says_what_it_would_have_said(engine):
    """Whatever it may take of others. What it was preempted for needs a part of its first stage's
    blocks alone."""
    long = asked(DOCUMENTS[0], params={"max_tokens": 20})
    short = asked(DOCUMENTS[1][:62])
    singly = []
    for one in (long, short):
        engine.fresh()
        singly.append(engine.run("serve", requests=[one])["tokens"][0])
    for reuse in ("deep", "exact", "off"):
        engine.fresh(60)
        params = long["params"] | {"extra_args": {"lazyllm_reuse": reuse}}
        requests = [long | {"params": params, "priority": 1}, short | {"at": 4}]
        result = engine.run("serve", requests=requests)
        assert [one["said"] > 0 for one in result["preemptions"]] == [True]
        assert goes_on(result)
        assert result["tokens"] == singly
        assert result["free_blocks"] == [60] * 2


def test_in_the_pieces_of_cuda_graphs_it_is_the_same(engine):
    """The last test: from now on the engine runs stages so."""
    answers = []
    for in_pieces in (False, True):
        if in_pieces:
            engine.run("run_stages_in_pieces")
        engine.fresh()
        engine.generate([DOCUMENTS[0]], 1)
        answers.append(engine.generate([DOCUMENTS[0] + QUESTIONS[0]], NEW_TOKENS))
        assert goes_on(answers[-1])
    # The prompt ends where a block does not: behind stage 0 its last token is a decode.
    assert {(stage, 40 + QUOTA) for stage in (1, 2, 3)} <= set(
        map(tuple, engine.run("stages_in_pieces"))
    )
    for what in ("tokens", "prefills", "decodes"):
        assert answers[0][what] == answers[1][what]
