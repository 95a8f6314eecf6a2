"""Turns in CUDA graphs beside the same turns without, in one engine of a Llama with random weights;
short prompts that share all keys of those before; and that no request waits for Triton's compiler.
"""

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
    # Alone: as many rows; the last one more than a graph of one turn has. With 512 of its own it
    # would be a long turn, which has none.
    turns = [document + ids(n) for n in (40, 16, 264, 496, 500)]
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
            of_turns = []  # what turns revive, and no decode after them
            for some in ([[turn] for turn in turns], several):
                engine.fresh()
                engine.generate([document], 1)
                for each in some:
                    of_turns += engine.generate(each, 1)["stats"]
            engine.fresh()
            engine.generate([document], 1)
            alone = engine.generate(turns, NEW_TOKENS, logprobs=1, together=False)
            beside = engine.run("serve", requests=served)
            at_once = [engine.generate(some, NEW_TOKENS, logprobs=1) for some in several]
            answers = {"alone": alone, "beside": beside, "at once": at_once}
            answers["turns"] = [stats["revived"] for stats in of_turns]
            answers["short"] = []
            for known in ([], [document[:300]]):
                engine.fresh()
                for prompt in known:
                    engine.generate([prompt], 1)
                answers["short"].append(engine.generate([document[:400]], 8, logprobs=1))
            late = {"prompt": document[:430], "params": params | {"max_tokens": 1}, "at": 8}
            answers["short beside"] = [engine.generate([document[:430]], 1)["tokens"][0]]
            for known in ([], [document[:300]]):
                engine.fresh()
                for prompt in known:
                    engine.generate([prompt], 1)
                beside = engine.run("serve", requests=[*served[:5], late])
                answers["short beside"].append(beside["tokens"][-1][0])
            found.append(answers | engine.run("turns_watched"))
    finally:
        engine.close()
    return found


def test_they_run_in_graphs(results):
    with_graphs, without = results
    alone = [[1, 0, rows] for rows in (64, 64, 384, 512)] + [[4, 0, 768]]
    at_once = [[2, 0, 256], [4, 0, 512]]
    beside = [[1, 8, rows] for rows in (64, 64, 384)]
    assert with_graphs["shapes"] == alone + at_once + alone + beside + at_once
    assert not without["shapes"]
    for result in results:
        assert [one["reused"] > 0 for one in result["alone"]["stats"]] == [True] * 5
        assert result["alone"]["free_blocks"][0] == result["alone"]["free_blocks"][1]


def test_they_are_as_without(results):
    """Log-probabilities before the first token that differs; each turn revives as many tokens, and
    how many decodes revive afterwards goes by what they say. The decodes beside them say the
    same."""
    assert results[0]["turns"] == results[1]["turns"]
    assert all(max(revived) > 0 for revived in results[0]["turns"])
    of_both = [[result["alone"], *result["at once"]] for result in results]
    for mine, theirs in zip(*of_both):
        drifts = drifts_between(mine, theirs)
        print(f"{max(drifts):.4f}, on average {fmean(drifts):.4f}")
        assert max(drifts) < 0.1 and fmean(drifts) < 0.01
    mine, theirs = (result["beside"]["tokens"] for result in results)
    same = [a[0][:4] == b[0][:4] for a, b in zip(mine, theirs)]
    assert sum(same) >= len(same) - 1, "close scores may choose another token"


def test_a_short_prompt_is_the_same_with_a_cached_prefix(results):
    """It is not pruned; alone, and beside requests that decode."""
    for result in results:
        cold, hit = result["short"]
        assert (cold["cached"], hit["cached"]) == ([0], [256])
        assert max(drifts_between(cold, hit)) < 0.1
        assert len({token for (token,) in result["short beside"]}) == 1


def test_nothing_is_compiled_while_requests_wait(results):
    assert [result["compiled"] for result in results] == [[], []]
