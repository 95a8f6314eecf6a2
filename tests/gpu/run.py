"""Everything that only a GPU can show, in one command:  python tests/gpu/run.py [PART ...]

Kernels compiled, in bf16, against their references; the engine against the slow reference on a
small Llama; then engines of a Llama with random weights, beside each other: prompts of 3 to 32,768
tokens, the longest joining the others while they decode, with and without CUDA graphs, until no
request has room left to revive. Needs a CUDA build of vLLM 0.32 and this package installed; no
weights. CI does not run it. For times, see ``python -m benchmarks speed``.

Arguments: ``kernels``, ``small`` (engine against reference) or ``engines`` for one part.
"""

import json
import math
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import engine  # noqa: E402
import kernel_checks  # noqa: E402
import torch  # noqa: E402

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000,
    "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128, "hidden_act": "silu",
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
PROMPTS = (512, 3, 1000, 4096, 300, 16384, 2048, 32768)
PRUNE = [{"layer": 4, "keep": 0.5}, {"layer": 8, "keep": 0.25}, {"layer": 12, "keep": 0.125}]
NEW_TOKENS = 80

failures = []


def report(what: str, check) -> None:
    try:
        detail = check() or ""
    except Exception as error:  # every check is reported, whatever the others did
        failures.append(what)
        detail = f"FAILED {type(error).__name__}: {str(error)[-2500:]}"
    print(f"{what:58} {detail or 'ok'}", flush=True)


def kernels() -> None:
    gpu = {"device": "cuda"}
    bf16 = {**gpu, "dtype": torch.bfloat16}
    for seed in (0, 1, kernel_checks.LONG):
        for stage in (0, 1, 2):
            for strict in (False, True):
                report(
                    f"attention, seed {seed}, stage {stage}, strict {strict}",
                    lambda: kernel_checks.check_attention(seed, stage, strict, **bf16),
                )
        for stage, window, peak in ((0, 1, False), (0, 16, True), (2, 4, False), (2, 1, True)):
            report(
                f"score, seed {seed}, stage {stage}, window {window}, peak {peak}",
                lambda: kernel_checks.check_score(seed, stage, window, peak, **bf16),
            )
        for stage in (1, 2):
            for ties in (False, True):
                report(
                    f"prefill selection, seed {seed}, stage {stage}, ties {ties}",
                    lambda: kernel_checks.check_prefill_selection(seed, stage, ties, **gpu),
                )
            for strict in (False, True):
                report(
                    f"rank, seed {seed}, stage {stage}, strict {strict}",
                    lambda: kernel_checks.check_rank(seed, stage, 13, strict, **gpu),
                )
                for share, ties in ((0, True), (3, True), (40, True), (5, False)):
                    report(
                        f"decode selection, seed {seed}, {stage}, {strict}, {share}, {ties}",
                        lambda: kernel_checks.check_decode_selection(
                            seed, stage, strict, share, ties, **gpu
                        ),
                    )
        report(
            f"place and write, seed {seed}",
            lambda: kernel_checks.check_place_and_write(seed, **bf16),
        )
    for num_decodes in (0, 4):
        report(
            f"start of a step, {num_decodes} decodes",
            lambda: kernel_checks.check_begin_step(0, 5, False, num_decodes, **gpu),
        )
    for shape, (heads, kv_heads, size) in enumerate(kernel_checks.ROTARY_SHAPES):
        report(
            f"rotate and write, {heads} heads, {kv_heads} KV heads, size {size}",
            lambda: kernel_checks.check_rotate_and_write(shape, **bf16),
        )
    report("prefill attention", lambda: kernel_checks.check_prefill_attention(0, **bf16))
    report("strict mask", lambda: kernel_checks.check_strict_attention_masks(**gpu))
    for has_aux in (False, True):
        report(f"Aux copies, {has_aux}", lambda: kernel_checks.check_aux_copies(has_aux, **bf16))


def small_llama_against_reference(folder: Path) -> None:
    """The engine's kept sets and tokens against the reference's, on random weights. bf16 rounding
    reorders close scores, so sets are compared by how much they share, and tokens by how far their
    logits lie under the best: in standard deviations, on average 0.06 where the reference itself
    runs in bf16, and 1.1 where it pools scores over three tokens instead of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from lazyllm_vllm import reference
    from lazyllm_vllm.plan.config import parse_config

    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=1024, num_hidden_layers=6,
        num_attention_heads=8, num_key_value_heads=2, head_dim=64, max_position_embeddings=4096,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(shape)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            scale = 1.0 if "embed" in name else weight.shape[1] ** -0.5
            weight.data.normal_(0, scale * (2 if "q_proj" in name or "k_proj" in name else 1))
    model.to(torch.bfloat16).save_pretrained(folder)
    # Loaded anew, since casting a model rounds its rotary frequencies too, and vLLM's are exact.
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    random = torch.Generator().manual_seed(2)
    lengths = (300, 801, 1500, 350, 400, 450, 500, 600, 700, 900)
    prompts = [torch.randint(3, 4000, (n,), generator=random).tolist() for n in lengths]
    for decode in ("resident", "strict"):
        paper = {"score": "mean", "score_window": 1} if decode == "strict" else {}
        config = paper | {
            "prune": [{"layer": 2, "keep": 0.5}, {"layer": 4, "keep": 0.25}], "decode": decode,
            "min_prompt_tokens": 256, "first_tokens": 4, "last_tokens": 32, "score_pool": 1,
        }  # fmt: skip

        def check() -> str:
            result = engine.run(
                folder, prompts, config | {"revive_budget": 16 * len(prompts)},
                {"dtype": "bfloat16", "skip_tokenizer_init": True, "max_num_seqs": len(prompts),
                 "max_num_batched_tokens": 8192, "max_model_len": 2048},
                max_tokens=2, trace=True,
            )  # fmt: skip
            alone = parse_config(config | {"revive_budget": 16})
            shares, under = [], []
            for i, prompt in enumerate(prompts):
                ref = reference.generate(model, prompt, alone, 2)
                request = next(r for r in result["trace"]["prefills"] if r.split("-")[0] == str(i))
                for s in (1, 2):
                    mine = set(result["trace"]["prefills"][request][0][str(s)])
                    assert len(mine) == len(ref.kept[s])
                    shares.append(len(mine & set(ref.kept[s])) / len(mine))
                    step = result["trace"]["decodes"][request][0][str(s)]
                    theirs = set(ref.selected[0][s - 1])
                    if ref.tokens[0] == result["tokens"][i][0]:
                        shares.append(len(theirs & set(step["selected"])) / len(theirs))
                logits = ref.logits[0]
                gap = logits.max() - logits[result["tokens"][i][0]]
                under.append(float(gap / logits.std()))
            assert statistics.fmean(shares) > 0.97, shares
            assert statistics.fmean(under) < 0.3, under
            return (
                f"sets share {statistics.fmean(shares):.3f}, {min(shares):.3f} at least; first "
                f"tokens {statistics.fmean(under):.3f} deviations under the best"
            )

        report(f"small Llama against the reference, {decode}", check)


def engines(model: Path) -> None:
    random = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 32000, (n,), generator=random).tolist() for n in PROMPTS]
    options = {
        "dtype": "bfloat16", "load_format": "dummy", "skip_tokenizer_init": True,
        "max_model_len": 33000, "max_num_batched_tokens": 33000, "max_num_seqs": 16,
        "enforce_eager": False, "enable_prefix_caching": False,
        "kv_cache_memory_bytes": 6 << 30, "gpu_memory_utilization": 0.1,
    }  # fmt: skip
    pruned = {"prune": PRUNE, "revive_reserve": 0.01, "min_prompt_tokens": 512}
    whole = {"prune": [{"layer": 4, "keep": 1}, {"layer": 8, "keep": 1}]}
    runs = {
        "stock": (None, {}),
        "keep 1": (whole, {}),
        "resident, CUDA graphs": (pruned, {}),
        "the same, small ops not compiled": (pruned, {}),
        "resident, eager": (pruned, {"enforce_eager": True}),
        "strict, CUDA graphs": (pruned | {"decode": "strict"}, {}),
    }
    results = {}

    def one(name: str) -> str:
        config, more = runs[name]
        result = engine.run(
            model,
            prompts,
            config,
            options | more,
            max_tokens=NEW_TOKENS,
            logprobs=1,
            random_weights=True,
            # Prefilled in piecewise CUDA graphs, unless pruned.
            alone=[p[:500] for p in prompts[2:6]] + [p[:900] for p in prompts[5:7]],
            compiled_ops="not compiled" not in name,
        )
        values = [x for r in result["logprobs"] for step in r for x in step.values()]
        assert all(math.isfinite(x) for x in values), "a logprob is not finite"
        assert all(len(t) == NEW_TOKENS for t in result["tokens"])
        assert result["free_blocks"][0] == result["free_blocks"][1], "blocks were lost"
        results[name] = result
        detail = f"{result['seconds']:.1f} s, room {result['room']:,}, "
        detail += f"async {result['async_scheduling']}"
        if config:
            total = result["stats"]["total"]
            detail += f", kept {total['kept']}, revived {total['revived']}, "
            detail += f"share {total['share_computed']:.3f}"
            if config is not whole:
                strict = config.get("decode") == "strict"
                assert bool(result["full"]) != strict, "requests fill up, and strict never looks"
                detail += f", {len(result['full'])} full"
                assert sum(total["revived"]) > 0, "nothing was revived"
                for r in result["stats"]["requests"]:
                    n = r["prompt_tokens"]
                    want = (
                        [n, n, n, n]
                        if n < 512
                        else [max(math.ceil(n * k), min(n, 20)) for k in (1, 0.5, 0.25, 0.125)]
                    )
                    assert r["kept"] == want, (n, r["kept"], want)
        return detail

    def alike(a: str, b: str, most: float) -> str:
        pairs = list(zip(results[a]["tokens"], results[b]["tokens"]))
        first = [next((i for i, (x, y) in enumerate(zip(*p)) if x != y), NEW_TOKENS) for p in pairs]
        drift = max(
            abs(x[t] - y[t])
            for p, q, n in zip(results[a]["logprobs"], results[b]["logprobs"], first)
            for x, y in zip(p[:n], q[:n])
            for t in x.keys() & y.keys()
        )
        assert drift < most, f"logprobs of the same tokens differ by {drift}"
        return f"equal tokens before the first difference: {first}; logprobs within {drift:.4f}"

    # The longest prompt does not fit in the first step's budget: it joins requests that decode.
    with ThreadPoolExecutor() as pool:
        started = {name: pool.submit(one, name) for name in runs}
        for name, done in started.items():
            report(name, done.result)
    report("keep 1 against stock", lambda: alike("stock", "keep 1", 0.1))
    for name in ("resident, CUDA graphs", "the same, small ops not compiled"):
        # Which attention kernel a decode takes depends on when a full room is seen, rows that pad
        # a piecewise graph and compiled ops round otherwise, and rounding chooses other tokens
        # among close scores.
        most = 0.1 if "not" in name else 0.4
        report(f"{name} against eager", lambda: alike("resident, eager", name, most))


if __name__ == "__main__":
    parts = sys.argv[1:] or ["kernels", "small", "engines"]
    if "kernels" in parts:
        kernels()
    if "small" in parts and not failures:
        with tempfile.TemporaryDirectory() as folder:
            small_llama_against_reference(Path(folder))
    if "engines" in parts and not failures:
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(LLAMA))
            engines(Path(folder))
    print(f"{len(failures)} failed: {failures}" if failures else "all passed")
    sys.exit(bool(failures))
