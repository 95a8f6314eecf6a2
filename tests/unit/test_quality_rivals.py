"""Compressed prompts by hand, and rivals at as many operations as LazyLLM."""

import argparse
import json

import pytest
import torch

from benchmarks.quality import compression, evaluate, run
from benchmarks.quality.compression import CompressingLLM, Compression, last_query_scores
from benchmarks.quality.methods import METHODS, SCORES
from benchmarks.quality.rivals import AT_LIKE, FASTKV, LIKE, rivals
from benchmarks.quality.schedules import COMPARED, CURVE, Anew, Schedule, at_equal_operations
from benchmarks.quality.scorers import SCORERS
from benchmarks.speed.shapes import SHAPES
from lazyllm_vllm.plan.config import LazyLLMConfig
from lazyllm_vllm.plan.operations import flops


def test_last_query_scores_by_hand():
    """Two heads share the keys of one; zeros beyond either end."""
    q, k = torch.randn(4, 8), torch.randn(7, 2, 8)
    products = [sum(float(q[h] @ k[j, h // 2]) for h in range(4)) for j in range(7)]
    padded = [0.0, 0.0, *products, 0.0, 0.0]
    expected = [sum(padded[j : j + 5]) / 5 for j in range(7)]
    torch.testing.assert_close(last_query_scores(q, k), torch.tensor(expected))


def test_compression_keeps_the_highest_and_both_ends():
    scores = torch.tensor([0.0, 5, 1, 5, 2, 5, 3, 0, 0, 0])
    assert Compression("surprise", 0.3).kept(scores) == [1, 3, 5]
    assert Compression("surprise", 0.2).kept(scores) == [1, 3], "of equal ones the first"
    assert Compression("surprise", 0.5, 1, 2).kept(scores) == [0, 1, 3, 8, 9]
    assert Compression("surprise", 0.1, 2, 3).kept(scores) == [0, 1, 7, 8, 9], "never less"
    assert Compression("surprise", 0.31).kept(scores) == [1, 3, 5, 6], "rounded up"
    assert Compression("surprise", 0.1, 20, 20).kept(scores) == list(range(10))
    negative = torch.tensor([-3.0, -1, -2, -4])
    assert Compression("last query", 0.5).kept(negative) == [1, 2]


class FakeLLM:
    """Expects a token the less the larger it is; its answers are what it was asked."""

    llm_engine = "engine"

    def generate(self, prompts, params, use_tqdm):
        ids = [prompt["prompt_token_ids"] for prompt in prompts]
        if params == "asked":
            return ids
        assert params.prompt_logprobs == 0 and params.max_tokens == 1

        class Told:
            def __init__(self, logprob):
                self.logprob = logprob

        class Output:
            def __init__(self, p):
                self.prompt_logprobs = [None, *({t: Told(-t), 77: Told(0)} for t in p[1:])]

        return [Output(p) for p in ids]


def test_only_long_prompts_are_compressed_and_in_their_order():
    how = Compression("surprise", 0.5, first_tokens=0, last_tokens=1, min_prompt_tokens=6)
    llm = CompressingLLM(FakeLLM(), how)
    prompts = [[3, 1, 2], [1, 9, 2, 8, 3, 7, 4, 6], [1, 2], [1, 2, 3, 4, 5, 6]]
    answers = llm.generate([{"prompt_token_ids": p} for p in prompts], "asked", use_tqdm=False)
    # The first token is kept: nothing comes before it.
    assert answers == [[3, 1, 2], [1, 9, 8, 6], [1, 2], [1, 5, 6]]
    assert llm.llm_engine == "engine"
    short = [[1, 2, 3]]
    assert llm.generate([{"prompt_token_ids": p} for p in short], "asked", use_tqdm=False) == short


def test_as_short_prompts_are_compressed_as_pruned():
    assert Compression("surprise", 0.5).min_prompt_tokens == evaluate.SHORTEST


@pytest.fixture
def model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPES["Llama-3.1-8B"]))
    return tmp_path


def test_operations_of_running_anew_by_hand(model):
    """Those of a model of the first layers, and of a short prompt; the head runs once."""
    shape = json.loads((model / "config.json").read_text())
    head = 2 * shape["hidden_size"] * shape["vocab_size"]
    first = flops(shape | {"num_hidden_layers": 13}, (), 1000)
    again = flops(shape, (), 250)
    anew = Anew(((13 / 32, 0.25),))
    assert anew.operations(model, 1000) == pytest.approx(first + again - head, rel=1e-12)
    bound = flops(shape, (), 1000) / (first + again - head)
    assert anew.flop_bound(model, 1000) == pytest.approx(bound, rel=1e-12)
    assert Anew(((0.0, 0.25),)).operations(model, 1000) == pytest.approx(again, rel=1e-12)
    assert anew.prune(32) == [] and anew.name == "0.25 anew after 0.41"


@pytest.mark.parametrize("lengths", ([1000], [500, 4000]))
def test_operations_are_made_equal(model, lengths):
    def total(schedule):
        return sum(schedule.operations(model, n) for n in lengths)

    for like in (CURVE[2], Schedule(((1 / 4, 0.5), (3 / 4, 0.2)))):
        for make in (
            lambda keep: Schedule(((1 / 2, keep),)),
            lambda keep: Anew(((13 / 32, keep),)),
        ):
            equal = at_equal_operations(make, like, model, lengths)
            assert total(equal) == pytest.approx(total(like), rel=1e-12)
            if lengths == [1000]:
                bound = equal.flop_bound(model, 1000)
                assert bound == pytest.approx(like.flop_bound(model, 1000), rel=1e-12)
    same = at_equal_operations(lambda keep: Schedule(((1 / 3, keep),)), CURVE[3], model, lengths)
    assert same.cuts[0][1] == pytest.approx(0.3, rel=1e-9)


def test_operations_that_cannot_be_equal(model):
    """Half of the layers on all tokens are more than LazyLLM's; never more than all there are."""

    def late(keep):
        return Schedule(((1 / 2, keep),))

    assert COMPARED.flop_bound(model, 1000) > 2 > late(0.0).flop_bound(model, 1000)
    assert at_equal_operations(late, COMPARED, model, [1000]) is None
    anew = Schedule(((1 / 2, 1.0),))
    assert at_equal_operations(lambda keep: late(keep / 2), anew, model, [1000]) is None
    like = late(0.1)
    assert at_equal_operations(late, like, model, [1000], least=99) is not None
    assert at_equal_operations(late, like, model, [1000], least=101) is None


def test_rivals_run_at_equal_operations(model, capsys):
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    line = ["rivals", "--model", str(model), "--lengths", "1000", "2000"]
    jobs = run.jobs(parser.parse_args(line))[1:]
    others = {"FastKV", "GemFilter", "GemFilter, ends kept", "prompt compression"}
    total = {
        like: sum(like.operations(model, n) for n in (1000, 2000)) for like in (LIKE[0], LIKE[1])
    }
    for like, operations in total.items():
        mine = [
            job.method.name
            for job in jobs
            if "UniPrefill" not in job.method.name
            and sum(job.schedule.operations(model, n) for n in (1000, 2000))
            == pytest.approx(operations, rel=1e-9)
        ]
        assert sorted(mine) == sorted([*others, *(method.name for method in AT_LIKE)])
    assert len(AT_LIKE) == 5 and all(method in METHODS for method in AT_LIKE)
    assert capsys.readouterr().out == "left out: FastKV, which cannot take as few operations\n"
    for job in jobs:
        if isinstance(job.method.scorer, Compression):
            assert job.schedule.cuts == ((job.method.scorer.depth, job.method.scorer.keep),)
        if "UniPrefill" in job.method.name:
            assert job.schedule.flop_bound(model, 1000) is None
    (own,) = (job for job in jobs if job.method is FASTKV and job.schedule.name == "0.2 after 0.50")
    assert own.schedule.prune(32) == [{"layer": 16, "keep": pytest.approx(0.2)}]


def test_configurations_are_valid_and_name_scorers(model):
    methods = [method for method, _ in rivals(LIKE, model, [1000])]
    for method in [*methods, *SCORES]:
        if isinstance(method.scorer, Compression):
            assert method.config is None and method.scorer.rule in compression.RULES
            continue
        LazyLLMConfig(**method.config)
        assert method.scorer is None or method.scorer in SCORERS
    assert len({method.name for method in SCORES}) == len(SCORES)


def test_all_rivals_run(model):
    names = {method.name.split(",")[0] for method, _ in rivals(LIKE, model, [1000])}
    assert names >= {"FastKV", "GemFilter", "UniPrefill", "prompt compression", "random"}
