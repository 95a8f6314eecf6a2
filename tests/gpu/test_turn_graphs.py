"""Turns in CUDA graphs beside the same turns without, in one engine of a Llama with random weights;
and that no request waits for Triton's compiler."""

import json
from statistics import fmean

import pytest
import torch
from harness.agreement import drifts_between
from harness.engine import EngineUnderTest
from test_engines import LLAMA

pytestmark = pytest.mark.gpu
CONFIG = {
    "prune": [{"layer": 8, "keep": 0.5}, {"layer": 12, "keep": 0.2}],
    "min_prompt_tokens": 512,
    "reuse": "deep",
}
OPTIONS = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 16384,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    "enforce_eager": False,
    "kv_cache_memory_bytes": 6 << 30,
    "gpu_memory_utilization": 0.1,
}
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """With graphs and without: turns alone and beside decodes, what ran in graphs, and what was
    compiled."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    random = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, 32000, (count,), generator=random).tolist()

    # Of the document's tokens 16 are in no whole block: they run again in the first stage alone.
    document, others = ids(10_000), [ids(60 + i) for i in range(5)]
    # Alone: as many rows, and one more than there is a graph for.
    turns = [document + ids(n) for n in (40, 16, 264, 496, 600)]
    several = [[turns[0], turns[1]], [*turns[:3], document + ids(100)]]
    params = {"temperature": 0, "ignore_eos": True}
    served = [{"prompt": prompt, "params": params | {"max_tokens": 40}} for prompt in others]
    for i, turn in enumerate(turns[:3]):
        served.append({"prompt": turn, "params": params | {"max_tokens": 8}, "at": 8 + 6 * i})
    # Norms and activations that are compiled round otherwise than those that are not.
    engine = EngineUnderTest(
        folder, CONFIG, {"random_weights": True, "compiled_ops": False}, **OPTIONS
    )
    found = []
    try:
        for graphs in (True, False):
            engine.run("watch_turns", graphs=graphs)
            engine.fresh()
            engine.generate([document], 1)
            alone = engine.generate(turns, NEW_TOKENS, logprobs=1, together=False)
            beside = engine.run("serve", requests=served)
            at_once = [engine.generate(some, NEW_TOKENS, logprobs=1) for some in several]
            answers = {"alone": alone, "beside": beside, "at once": at_once}
            found.append(answers | engine.run("turns_watched"))
    finally:
        engine.close()
    return found


def test_they_run_in_graphs(results):
    with_graphs, without = results
    print(with_graphs["shapes"])
    assert with_graphs["shapes"][:4] == [[1, 0, rows] for rows in (64, 64, 384, 512)]
    assert with_graphs["shapes"][4:7] == [[1, 8, rows] for rows in (64, 64, 384)]
    assert with_graphs["shapes"][7:] == [[2, 0, 256], [4, 0, 512]]
    assert not without["shapes"]
    for result in results:
        assert [one["reused"] > 0 for one in result["alone"]["stats"]] == [True] * 5
        assert result["alone"]["free_blocks"][0] == result["alone"]["free_blocks"][1]


def test_they_are_as_without(results):
    """Log-probabilities before the first token that differs; revived tokens as many. The decodes
    beside them say the same."""
    of_both = [[result["alone"], *result["at once"]] for result in results]
    for mine, theirs in zip(*of_both):
        drifts = drifts_between(mine, theirs)
        print(f"{max(drifts):.4f}, on average {fmean(drifts):.4f}")
        assert max(drifts) < 0.1 and fmean(drifts) < 0.01
        for a, b in zip(mine["stats"], theirs["stats"]):
            # With all that decodes revive afterwards, of close scores.
            assert a["revived"] == pytest.approx(b["revived"], rel=0.1)
    mine, theirs = (result["beside"]["tokens"] for result in results)
    same = [a[0][:4] == b[0][:4] for a, b in zip(mine, theirs)]
    assert sum(same) >= len(same) - 1, "close scores may choose another token"


def test_nothing_is_compiled_while_requests_wait(results):
    assert [result["compiled"] for result in results] == [[], []]
