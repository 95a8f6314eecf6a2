"""Every kernel compiles for Hopper and fits there, with no GPU at hand: the interpreter takes code
that Triton's compiler does not, and has memory without end."""

import importlib
import os
import pkgutil
import subprocess
import sys

BF16 = {
    "q_ptr",
    "out_ptr",
    "k_ptr",
    "v_ptr",
    "hidden_ptr",
    "residual_ptr",
    "aux_ptr",
    "cos_sin_ptr",
    "sinks_ptr",
}
FP32 = {"partial_ptr", "partial_lse_ptr", "lse_ptr", "score_ptr", "scale_ptr", "dense_ptr"}
INT64 = {
    "row_position_ptr",
    "positions_ptr",
    "slot_mapping_ptr",
    "slots_ptr",
    "slot_ptr",
}
CACHES = {"kv_ptr", "aux_ptr", "cache_ptr"}  # of the model's dtype or FP8
SHARED_MEMORY = 232448  # bytes that a program may have on Hopper
LLAMA = {"NUM_HEADS": 32, "HEAD_DIM": 128, "HEAD_PAD": 128}
STATE = {"PAGES": 8, "PER_PAGE": 8, "SLOT_SIZE": 2048, "PER_SLOT": 512}  # in four-byte words
AUX = STATE | {"SLOT_SIZE": 4096, "BLOCK": 2048}  # in bf16


def _variants(kernels):
    """Each kernel, with constants that an engine gives it."""
    for stage in (0, 2):
        keys = {"IDENTITY": stage == 0, "BLOCK_SIZE": 64}
        for window, group, head_dim, block_n in ((0, 16, 128, 128), (128, 4, 256, 64)):
            yield (
                kernels.attention._attention_kernel,
                LLAMA
                | keys
                | STATE
                | {
                    "GROUP": group,
                    "HEAD_DIM": head_dim,
                    "HEAD_PAD": head_dim,
                    "STRICT": stage > 0,
                    "WINDOW": window,
                    "BLOCK_M": 64,
                    "BLOCK_N": block_n,
                },
            )
        yield (
            kernels.combine_splits._combine_kernel,
            LLAMA | {"IDENTITY": stage == 0, "SINKS": stage > 0},
        )
        copied = {"WORDS": 65536, "SLOTS": 64, "SLOTS_PAD": 64, "AT_ONCE": 4096}
        yield kernels.copy_blocks._copy_blocks_kernel, copied
        gathered = {"HEADS": 8, "HEAD_DIM": 128, "HEAD_PAD": 128, "BLOCK": 32}
        yield kernels.gather_keys._gather_keys_kernel, gathered | keys
        for window, group, head_dim in ((1, 4, 128), (16, 4, 128), (16, 16, 128), (32, 8, 256)):
            yield (
                kernels.score._score_kernel,
                LLAMA
                | keys
                | STATE
                | {
                    "PEAK": window > 1,
                    "ACCUMULATES": window > 1,
                    "KV_HEADS": 1,
                    "WINDOW": window,
                    "GROUP": group,
                    "QUERIES": kernels.score.queries_at_once(window * group, head_dim, 2),
                    "HEAD_DIM": head_dim,
                    "HEAD_PAD": head_dim,
                    "BLOCK_N": 64,
                },
            )
    blocks = STATE | {"BLOCK": 1024}
    splits = {"MAX_SPLITS": kernels.top_k.MAX_SPLITS}
    for first, strict in ((True, False), (False, True)):
        for lists in (1, 2):
            yield (
                kernels.rank._rank_kernel,
                blocks
                | {"FIRST": first, "BEFORE": 16, "AFTER": 4, "STRICT": strict, "LISTS": lists},
            )
            for step in (1, 2):
                yield kernels.top_k._refine_kernel, blocks | {"STEP": step, "LISTS": lists}
            yield kernels.top_k._count_kernel, blocks | splits | {"LISTS": lists}
            yield (
                kernels.select_decode._select_decode_kernel,
                blocks | splits | {"FIRST": first, "LISTS": lists, "MARKS": strict},
            )
        yield kernels.select_prefill._select_prefill_kernel, blocks | splits
    for back in (False, True):
        constants = {"BACK": back, "MAX_BATCH": 256}
        yield kernels.dense_scores._dense_scores_kernel, blocks | constants
    yield kernels.begin_step._begin_step_kernel, {"BLOCK": 1024}
    yield kernels.place._place_kernel, {"BLOCK_SIZE": 64, "BLOCK": 256}
    for heads, pad, kv_heads, kv_pad, head_dim, half in (
        (9, 16, 3, 4, 64, 32),
        (32, 32, 8, 8, 128, 64),
        (32, 32, 8, 8, 128, 48),
        (64, 64, 4, 4, 128, 64),
    ):
        yield (
            kernels.rotary._rotate_and_write_kernel,
            {
                "HEADS": heads,
                "HEADS_PAD": pad,
                "KV_HEADS": kv_heads,
                "KV_PAD": kv_pad,
                "HEAD_DIM": head_dim,
                "HEAD_PAD": head_dim,
                "HALF": half,
                "HALF_PAD": 32 if half == 32 else 64,
                "BLOCK_SIZE": 64,
            },
        )
    for head_dim, head_pad, sinks in ((64, 64, True), (80, 128, False), (256, 256, False)):
        yield (
            kernels.window_attention._window_attention_kernel,
            {
                "GROUP": 4,
                "HEAD_DIM": head_dim,
                "HEAD_PAD": head_pad,
                "WINDOW": 1024,
                "SINKS": sinks,
                "BLOCK_M": 128,
                "BLOCK_N": 64,
                "BLOCK": 1024,
            },
        )
    for hidden, width in ((8192, 4096), (2880, 960), (576, 192)):
        pad, whole = (1 << (n - 1).bit_length() for n in (width, hidden))
        page = {"HIDDEN": hidden, "WIDTH": width, "WIDTH_PAD": pad, "BLOCK_SIZE": 64}
        yield kernels.parked._fetch_kernel, page
        for has_residual in (False, True):
            constants = {"HIDDEN_PAD": whole, "HAS_RESIDUAL": has_residual}
            yield kernels.parked._park_kernel, page | constants
    yield kernels.park_fetch._park_kernel, AUX
    for has_aux in (False, True):
        yield kernels.park_fetch._fetch_kernel, AUX | {"HAS_AUX": has_aux}


def _type_of(name: str, cache: str) -> str:
    if name.endswith("scale"):
        return "fp32"
    if name in CACHES:
        return cache
    kinds = {"*bf16": BF16, "*fp32": FP32, "*i64": INT64}
    pointer = next((kind for kind, names in kinds.items() if name in names), "*i32")
    return pointer if name.endswith("_ptr") else "i32"


def _compile_all() -> None:
    from triton.backends import backends

    from lazyllm_vllm.hooks.platform import _InterpretedBackend

    # Without a GPU vLLM would hide Triton from the kernels; see lazyllm_vllm.hooks.platform.
    # Triton itself must not meet the stand-in when it looks for a compiler.
    backends["cpu"] = _InterpretedBackend
    import vllm.triton_utils  # noqa: F401

    del backends["cpu"]
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from lazyllm_vllm import kernels

    names = [module.name for module in pkgutil.iter_modules(kernels.__path__)]
    modules = [importlib.import_module(f"{kernels.__name__}.{name}") for name in names]
    compiled = set()
    for kernel, constants in _variants(kernels):
        names = kernel.arg_names
        for cache in ("*bf16", "*fp8e4nv") if CACHES & set(names) else ("",):
            types = {n: "constexpr" if n in constants else _type_of(n, cache) for n in names}
            compiled_kernel = triton.compile(
                ASTSource(kernel, types, constants, _aligned(kernel, types)),
                target=GPUTarget("cuda", 90, 32),
                options=_options(kernel.__name__, constants),
            )
            needed = compiled_kernel.metadata.shared
            assert needed <= SHARED_MEMORY, f"{kernel.__name__}, {constants}: {needed} bytes"
        compiled.add((kernel.__module__, kernel.__name__))
    written = {(m.__name__, n) for m in modules for n in vars(m) if n.endswith("_kernel")}
    assert compiled == written, f"not compiled: {written - compiled}"
    print("compiled", len(compiled))


def _aligned(kernel, types: dict[str, str]) -> dict:
    """What the launcher finds divisible by 16: addresses and strides. What is so read is copied
    ahead, into shared memory."""
    return {
        (p.num,): [["tt.divisibility", 16]]
        for p in kernel.params
        if types[p.name].startswith("*") or "stride" in p.name
        if not (p.do_not_specialize or p.do_not_specialize_on_alignment)
    }


def _options(name: str, constants: dict) -> dict:
    """Triton's defaults, but for a kernel that takes half a minute with fewer warps than it is
    launched with."""
    if name == "_window_attention_kernel":
        return {"num_warps": 8, "num_stages": 3 if constants["HEAD_PAD"] <= 128 else 2}
    return {}


def test_kernels_compile_for_hopper(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    child = subprocess.run(
        [sys.executable, __file__], env=env, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0 and "compiled" in child.stdout, child.stderr[-4000:]


if __name__ == "__main__":
    _compile_all()
