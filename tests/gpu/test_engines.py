"""Engines of a Llama with random weights, beside each other: prompts of 3 to 32,768 tokens, the
longest joining the others while they decode, with and without CUDA graphs, until no request has
room left to revive. For times, see ``python -m benchmarks speed``.
"""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean

import pytest
import torch
from harness.agreement import drifts_between
from harness.engine import EngineUnderTest

pytestmark = pytest.mark.gpu
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPTIONS = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 33000,
    "max_num_batched_tokens": 33000,
    "max_num_seqs": 16,
    "enforce_eager": False,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 6 << 30,
    "gpu_memory_utilization": 0.1,
}
LENGTHS = (512, 3, 1000, 4096, 300, 16384, 2048, 32768)
PRUNED = {
    "prune": [{"layer": n, "keep": k} for n, k in ((4, 0.5), (8, 0.25), (12, 0.125))],
    "revive_reserve": 0.01,
    "revive_min_score": 0,
    "min_prompt_tokens": 512,
}
WHOLE = {"prune": [{"layer": 4, "keep": 1}, {"layer": 8, "keep": 1}]}
NEW_TOKENS = 80
# Name: configuration, more options, more of ``harness.engine.start``'s arguments.
RUNS = {
    "stock": (None, {}, {}),
    "keep 1": (WHOLE, {}, {}),
    "resident": (PRUNED, {}, {}),
    "resident, small ops not compiled": (PRUNED, {}, {"compiled_ops": False}),
    "resident, eager": (PRUNED, {"enforce_eager": True}, {}),
    "strict": (PRUNED | {"decode": "strict"}, {}, {}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of all runs, side by side on one GPU: name to a future."""
    folder = tmp_path_factory.mktemp("llama")
    (folder / "config.json").write_text(json.dumps(LLAMA))
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 32000, (n,), generator=random).tolist() for n in LENGTHS]
    # Prefilled in piecewise CUDA graphs, unless pruned.
    short = [p[:500] for p in prompts[2:6]] + [p[:900] for p in prompts[5:7]]

    def run(name: str) -> dict:
        config, options, arguments = RUNS[name]
        engine = EngineUnderTest(
            folder, config, arguments | {"random_weights": True}, **OPTIONS | options
        )
        try:
            # The longest does not fit in the first step's budget: it joins requests that decode.
            together = engine.generate(prompts, NEW_TOKENS, logprobs=1)
            alone = engine.generate(short, NEW_TOKENS, logprobs=1, together=False)
        finally:
            engine.close()
        for what in ("tokens", "logprobs", "stats"):
            together[what] = together.get(what, []) + alone.get(what, [])
        print(f"{name}: {together['seconds']:.1f} s, {len(together['full'])} full")
        return together

    with ThreadPoolExecutor() as pool:
        yield {name: pool.submit(run, name) for name in RUNS}


@pytest.mark.parametrize("name", RUNS)
def test_an_engine(results, name):
    result = results[name].result()
    values = [x for r in result["logprobs"] for step in r for x in step.values()]
    assert all(math.isfinite(x) for x in values), "a logprob is not finite"
    assert all(len(t) == NEW_TOKENS for t in result["tokens"])
    assert result["free_blocks"][0] == result["free_blocks"][1], "blocks were lost"


@pytest.mark.parametrize("name", [name for name in RUNS if name not in ("stock", "keep 1")])
def test_what_is_kept_and_revived(results, name):
    result = results[name].result()
    assert bool(result["full"]) != (name == "strict"), "requests fill up, and strict never looks"
    assert sum(sum(entry["revived"]) for entry in result["stats"]) > 0, "nothing was revived"
    for entry in result["stats"]:
        n = entry["prompt_tokens"]
        pruned = [max(math.ceil(n * k), min(n, 20)) for k in (1, 0.5, 0.25, 0.125)]
        assert entry["kept"] == (pruned if n >= 512 else [n] * 4), n


@pytest.mark.parametrize(
    "name, like, most, average",
    (
        ("keep 1", "stock", 0.1, 0.02),
        # Compiled ops round otherwise, which chooses other tokens among close scores, and so does a
        # decode's attention kernel, which depends on when a full room is seen: some log-probability
        # may be far off, most are not. Rounding alone, as above, is 0.014 on average.
        ("resident", "resident, eager", None, 0.05),
        # Without them pruned prompts in pieces of padded rows are as those run eagerly.
        ("resident, small ops not compiled", "resident, eager", 0.1, 0.01),
    ),
)
def test_engines_agree(results, name, like, most, average):
    """On the log-probabilities of the tokens before the first that differs."""
    mine, theirs = results[name].result(), results[like].result()
    drifts = drifts_between(mine, theirs)
    print(f"{name} against {like}: {max(drifts):.4f}, on average {fmean(drifts):.4f}")
    assert fmean(drifts) < average
    assert most is None or max(drifts) < most
