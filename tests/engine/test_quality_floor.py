"""Answers have not got worse: a small part of ``python -m benchmarks quality``, through the engine.

A number among others, hidden in real prose, is what pruning loses first.
"""

import pytest
from transformers import AutoConfig, AutoTokenizer

from benchmarks.quality import evaluate
from benchmarks.quality.evaluate import Cell, Model
from benchmarks.quality.methods import FULL, LAZYLLM, METHODS, Method
from benchmarks.quality.tasks import TASKS

SAMPLES, TOKENS = 12, 700


@pytest.fixture(scope="module")
def model(smollm2):
    options = {"dtype": "float32", "max_model_len": 1024, "max_num_seqs": 16, "enforce_eager": True}
    layers = AutoConfig.from_pretrained(smollm2).num_hidden_layers
    return Model(smollm2, AutoTokenizer.from_pretrained(smollm2), layers, options)


def test_balanced_answers_like_the_full_model_and_random_does_not(model):
    random = next(method for method in METHODS if method.name == "random")
    balanced = {"preset": "balanced"}
    methods = {
        "full": FULL,
        "balanced": Method("balanced", LAZYLLM.config | balanced),
        "random": Method("random", random.config | balanced, random.scorer),
    }
    cell = Cell(TASKS["one needle of four"], TOKENS, evaluate.reporting(SAMPLES))
    share = {}
    for name, method in methods.items():
        evaluation = evaluate.open_evaluation(model, method)
        try:
            share[name] = evaluate.mean_and_error(evaluation.scores([cell])[0])[0]
        finally:
            evaluation.close()
    assert share["full"] >= 0.9, share
    assert share["balanced"] >= 0.85 * share["full"], share
    assert share["balanced"] >= share["random"] + 0.3, share
