"""Answers have not got worse: a small part of ``python -m benchmarks quality``, through the engine.

The worst task decides, not the mean.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import AutoTokenizer

from benchmarks.quality import evaluate
from benchmarks.quality.evaluate import Cell, Model
from benchmarks.quality.methods import FULL, LAZYLLM, METHODS, Method
from benchmarks.quality.shares import LEAST
from benchmarks.quality.tasks import TASKS

TOKENS, SAMPLES = 1060, 4
HIDDEN = "one needle of four"  # a number among others, in real prose
# Left out: what SmolLM2 itself cannot do, and copies of 36 characters, of which it loses some.
NAMES = (
    HIDDEN,
    "niah single 1",
    "niah single 2",
    "few-shot classification",
    "many-shot, 10 labels",
)
FLOOR = 0.9  # of the full model's score


@pytest.fixture(scope="module")
def model(smollm2):
    options = {
        "dtype": "bfloat16",
        "max_model_len": 1280,
        "max_num_seqs": 16,
        "enforce_eager": True,
    }
    return Model(smollm2, AutoTokenizer.from_pretrained(smollm2), options)


@pytest.fixture(scope="module")
def scores(model):
    """Mean scores by method and task: the default preset on all tasks, random choice on one."""
    random = next(method for method in METHODS if method.name == "random")

    def score(method: Method, names: tuple[str, ...]) -> dict[str, float]:
        cells = [Cell(TASKS[name], TOKENS, evaluate.reporting(SAMPLES)) for name in names]
        evaluation = evaluate.open_evaluation(model, method)
        try:
            found = evaluation.scores(cells)
        finally:
            evaluation.close()
        return {name: sum(values) / len(values) for name, values in zip(names, found)}

    asked = {
        "full": (FULL, NAMES),
        "default": (LAZYLLM, NAMES),
        "random": (random, (HIDDEN,)),
    }
    with ThreadPoolExecutor(2) as pool:  # a core each
        found = {name: pool.submit(score, *of) for name, of in asked.items()}
        return {name: future.result() for name, future in found.items()}


def test_no_task_falls(scores):
    full = scores["full"]
    assert min(full.values()) >= LEAST, f"what SmolLM2 cannot do tells nothing: {full}"
    shares = {name: scores["default"][name] / full[name] for name in NAMES}
    worst = min(shares, key=shares.get)
    assert shares[worst] >= FLOOR, f"{worst}, of {shares}"


def test_random_choice_loses_what_is_kept(scores):
    assert scores["default"][HIDDEN] >= scores["random"][HIDDEN] + 0.3, scores
