"""The engine's kept sets and tokens against the reference's, on a small Llama with random weights.

bf16 rounding reorders close scores, so sets are compared by how much they have in common, and
tokens by how far their logits lie under the best: in standard deviations, on average 0.06 where the
reference itself runs in bf16, and 1.1 where it pools scores over three tokens instead of one.
"""

import statistics

import pytest
import torch
from harness import reference
from harness.agreement import drifts_between
from harness.engine import EngineUnderTest

from lazyllm_vllm.plan.config import parse_config

pytestmark = pytest.mark.gpu
NEW_TOKENS = 20
LENGTHS = (300, 801, 1500, 350, 400, 450, 500, 600, 700, 900)
OPTIONS = {
    "dtype": "bfloat16",
    "skip_tokenizer_init": True,
    "max_model_len": 2048,
    "gpu_memory_utilization": 0.1,
    "kv_cache_memory_bytes": 2 << 30,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(shape)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            weight.data.normal_(0, scale * (2 if "q_proj" in name or "k_proj" in name else 1))
    folder = tmp_path_factory.mktemp("small")
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


RANKS = [
    1,
    pytest.param(
        2, marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
    ),
]


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("decode", ("resident", "strict"))
def test_the_engine_agrees_with_the_reference(folder, decode, ranks):
    """With two ranks the trace also checks that both choose the same."""
    from transformers import LlamaForCausalLM

    # Loaded anew, since casting a model rounds its rotary frequencies too, and vLLM's are exact.
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(2)
    prompts = [torch.randint(3, 4000, (n,), generator=random).tolist() for n in LENGTHS]
    config = {
        "prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}],
        "decode": decode,
        "min_prompt_tokens": 256,
        "first_tokens": 4,
        "last_tokens": 32,
        "score_pool": 1,
        "revive_min_score": 0,
    }
    if decode == "strict":
        config |= {"score": "mean", "score_window": 1}
    engine = EngineUnderTest(
        folder,
        config | {"revive_budget": 16 * len(prompts)},
        {"trace": True},
        max_num_seqs=len(prompts),
        max_num_batched_tokens=8192,
        **OPTIONS,
        tensor_parallel_size=ranks,
    )
    try:
        result = engine.generate(prompts, 2)
    finally:
        engine.close()  # one with workers left open would keep this process from ending
    alone = parse_config(config | {"revive_budget": 16})
    in_common, under = [], []
    for i, prompt in enumerate(prompts):
        ref = reference.generate(model, prompt, alone, 2)
        for s in (1, 2):
            mine = set(result["prefills"][i][0][s])
            assert len(mine) == len(ref.kept[s])
            in_common.append(len(mine & set(ref.kept[s])) / len(mine))
            theirs = set(ref.selected[0][s - 1])
            if ref.tokens[0] == result["tokens"][i][0]:
                selected = set(result["decodes"][i][0][s]["selected"])
                in_common.append(len(theirs & selected) / len(theirs))
        logits = ref.logits[0]
        gap = logits.max() - logits[result["tokens"][i][0]]
        under.append(float(gap / logits.std()))
    found = statistics.fmean(in_common), statistics.fmean(under)
    print(f"{decode}, {ranks}: sets {found[0]:.3f}, under {found[1]:.3f}")
    assert found[0] > 0.97, in_common
    assert found[1] < 0.3, under


@pytest.mark.parametrize("chunk", (8192, 200))
def test_long_turns_agree_with_the_reference(folder, chunk):
    """What a turn of several hundred tokens keeps of them, beside what was there, and what it says
    first; in one chunk and in several."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, 4000, (n,), generator=random).tolist() for n in (600, 801, 900)]
    turns = [torch.randint(3, 4000, (n,), generator=random).tolist() for n in (300, 512, 701)]
    config = {
        "prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}],
        "min_prompt_tokens": 256,
        "score_pool": 1,
        "revive_min_score": 0,
        "reuse": "deep",
    }
    engine = EngineUnderTest(
        folder,
        config,
        {"trace": True},
        max_num_seqs=8,
        max_num_batched_tokens=8192,
        **OPTIONS,
    )
    in_common, under = [], []
    try:
        for prompt, turn in zip(prompts, turns):
            engine.fresh()
            said = engine.generate([prompt], 1)["tokens"][0]
            sequence = reference.ReferenceSequence(model, prompt, parse_config(config), 1000)
            sequence.prefill()
            logits = sequence.go_on(said + turn)
            engine.run("set_budget", tokens=chunk)
            result = engine.generate([prompt + said + turn], 1)
            resident = result["prefills"][0][-1]["resident"]
            for s in (1, 2):
                mine, theirs = set(resident[s]), set(sequence.trace.resident[s])
                assert len(mine) == len(theirs) < len(prompt + turn)
                in_common.append(len(mine & theirs) / len(mine))
            gap = logits.max() - logits[result["tokens"][0][0]]
            under.append(float(gap / logits.std()))
    finally:
        engine.close()
    found = statistics.fmean(in_common), statistics.fmean(under)
    print(f"long turns, {chunk}: sets {found[0]:.3f}, under {found[1]:.3f}")
    assert found[0] > 0.97, in_common
    assert found[1] < 0.3, under


@pytest.mark.parametrize("decode", ("resident", "strict"))
@pytest.mark.parametrize("ranks", RANKS[1:])
def test_ranks_in_graphs(folder, decode, ranks):
    """With everything kept, stock vLLM's log-probabilities; pruned, those of one rank, all in CUDA
    graphs. Two ranks round otherwise than one, which chooses other tokens among close scores."""
    random = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 4000, (n,), generator=random).tolist() for n in LENGTHS]
    cuts = [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}]
    rule = {"decode": decode, "min_prompt_tokens": 256, "revive_budget": 64}
    rule |= {"revive_min_score": 0}
    keep_all = {"prune": [cut | {"keep": 1} for cut in cuts]}

    def run(config: dict | None, ranks: int) -> dict:
        engine = EngineUnderTest(
            folder,
            config,
            enforce_eager=False,
            max_num_seqs=len(prompts),
            **OPTIONS,
            tensor_parallel_size=ranks,
        )
        try:
            return engine.generate(prompts, NEW_TOKENS, logprobs=1)
        finally:
            engine.close()

    pairs = {
        "all kept, stock": (run(keep_all | rule, ranks), run(None, ranks)),
        "pruned, one rank": (run({"prune": cuts} | rule, ranks), run({"prune": cuts} | rule, 1)),
    }
    for name, (mine, theirs) in pairs.items():
        drifts = drifts_between(mine, theirs)
        print(f"{decode}, {name}: {max(drifts):.3f}, on average {statistics.fmean(drifts):.4f}")
        assert mine["free_blocks"][0] == mine["free_blocks"][1]
        assert statistics.fmean(drifts) < (0.02 if "stock" in name else 0.05)
