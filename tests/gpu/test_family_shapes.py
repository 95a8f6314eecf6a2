"""Families of models beside Llama, at true widths with few layers and experts, and random weights:
keeping every token against stock vLLM, and pruned, with and without CUDA graphs. For times, see
``python -m benchmarks families``. Two run on two GPUs. One family alone: ``-m gpu -k gemma3``.
"""

import json
import math
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from harness.engine import EngineUnderTest

from benchmarks.speed.family_shapes import with_layers
from benchmarks.speed.shapes import SHAPES

pytestmark = pytest.mark.gpu
LENGTHS = (300, 1500, 5000)
NEW_TOKENS = 40
KEEPS = (0.5, 0.25, 0.125)
OPTIONS = {
    "dtype": "bfloat16",
    "load_format": "dummy",
    "skip_tokenizer_init": True,
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 4,
    "enforce_eager": True,
    "enable_prefix_caching": False,
    "kv_cache_memory_bytes": 3 << 30,
    "gpu_memory_utilization": 0.1,
}
GRAPHS = {"enforce_eager": False, "cudagraph_capture_sizes": [1, 2, 4]}


@dataclass(frozen=True)
class Family:
    """Attributes:
    shape: config.json.
    boundaries: layers to prune after; each sees all positions.
    options: more of the engines' options.
    most_drift: of log-probabilities from stock vLLM's, on average.
    """

    shape: dict
    boundaries: tuple[int, ...] = (2, 4, 6)
    options: dict = field(default_factory=dict)
    most_drift: float = 0.06

    @property
    def configs(self) -> dict[str, tuple[dict | None, dict]]:
        """Name of a run: LazyLLM's configuration, more options."""
        whole = {"prune": [{"layer": layer, "keep": 1} for layer in self.boundaries]}
        cuts = [{"layer": n, "keep": keep} for n, keep in zip(self.boundaries, KEEPS)]
        pruned = {"prune": cuts, "min_prompt_tokens": 512, "revive_budget": 64}
        pruned |= {"revive_min_score": 0}
        return {
            "stock": (None, {}),
            "keep 1": (whole, {}),
            "pruned": (pruned, {}),
            "pruned, graphs": (pruned, GRAPHS),
        }


def _small(name: str, num_layers: int, **changes) -> dict:
    return with_layers(SHAPES[name], num_layers) | {"vocab_size": 32000} | changes


# Of drifts the mean counts: rounding sends some tokens to other experts, and moves a few
# log-probabilities far. Where attention's output is disturbed by half a bit in Hugging Face's
# models, the mean is 0.02 to 0.04, of gpt-oss 0.07; keys of one layer 1.5 times as large make 0.12.
# With an FP8 KV cache stock vLLM has queries, and in prefill keys and values, in FP8 too.
FAMILIES = {
    "qwen3_dense": Family(_small("Qwen3-8B", 8)),
    "qwen3_moe": Family(_small("Qwen3-30B-A3B", 8, num_experts=16)),
    "gemma3": Family(_small("Gemma-3-4B", 18), (6, 12)),
    "gpt_oss": Family(_small("gpt-oss-20b", 8, num_local_experts=16), most_drift=0.15),
    "llama_fp8_kv": Family(
        _small("Llama-3.1-8B", 8), options={"kv_cache_dtype": "fp8"}, most_drift=0.15
    ),
    "llama_2_ranks": Family(_small("Llama-3.1-8B", 8), options={"tensor_parallel_size": 2}),
    "qwen3_moe_2_ranks": Family(
        _small("Qwen3-30B-A3B", 8, num_experts=16),
        options={"tensor_parallel_size": 2},
    ),
}


def _params() -> Iterator:
    has_two = torch.cuda.device_count() >= 2
    for name, family in FAMILIES.items():
        needs_two = family.options.get("tensor_parallel_size") == 2
        skip = pytest.mark.skipif(needs_two and not has_two, reason="needs two GPUs")
        yield pytest.param(name, marks=skip)


@pytest.fixture(scope="module", params=_params())
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(scope="module")
def results(family, tmp_path_factory):
    """Of a family's engines, side by side on one GPU: name to result."""
    folder = tmp_path_factory.mktemp("family")
    (folder / "config.json").write_text(json.dumps(family.shape))
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 30000, (n,), generator=random).tolist() for n in LENGTHS]

    def run(config: dict | None, options: dict) -> dict:
        given = OPTIONS | family.options | options
        engine = EngineUnderTest(folder, config, {"random_weights": True}, **given)
        try:
            return engine.generate(prompts, NEW_TOKENS, logprobs=5)
        finally:
            engine.close()

    with ThreadPoolExecutor() as pool:
        started = {name: pool.submit(run, *given) for name, given in family.configs.items()}
        return {name: future.result() for name, future in started.items()}


def test_engines_are_sound(results):
    for name, result in results.items():
        values = [x for r in result["logprobs"] for step in r for x in step.values()]
        assert all(math.isfinite(x) for x in values), f"{name}: a logprob is not finite"
        assert all(len(tokens) == NEW_TOKENS for tokens in result["tokens"]), name
        assert result["free_blocks"][0] == result["free_blocks"][1], f"{name}: blocks were lost"


def test_keeping_every_token_is_stock(results, family):
    assert _drift(results["keep 1"], results["stock"]) < family.most_drift


@pytest.mark.parametrize("name", ("pruned", "pruned, graphs"))
def test_what_is_kept_and_revived(results, family, name):
    keeps = (1, *KEEPS[: len(family.boundaries)])
    for n, entry in zip(LENGTHS, results[name]["stats"], strict=True):
        pruned = [max(math.ceil(n * keep), min(n, 20)) for keep in keeps]
        assert list(entry["kept"]) == (pruned if n >= 512 else [n] * len(keeps)), n
        assert bool(sum(entry["revived"])) == (n >= 512), n


def test_graphs_are_eager(results, family):
    """Compiled ops round otherwise, and rounding chooses other tokens among close scores."""
    assert _drift(results["pruned, graphs"], results["pruned"]) < 2 * family.most_drift


def _drift(mine: dict, theirs: dict) -> float:
    """Between the log-probabilities of the likeliest tokens, up to where one run takes another."""
    drifts = []
    for i, tokens in enumerate(zip(mine["tokens"], theirs["tokens"])):
        same = next((at for at, (x, y) in enumerate(zip(*tokens)) if x != y), NEW_TOKENS)
        for x, y in zip(mine["logprobs"][i][: same + 1], theirs["logprobs"][i][: same + 1]):
            drifts += [abs(x[t] - y[t]) for t in x.keys() & y.keys()]
    mean = statistics.fmean(drifts)
    print(f"{len(drifts)} log-probabilities differ by {mean:.4f}, at most {max(drifts):.4f}")
    return mean
