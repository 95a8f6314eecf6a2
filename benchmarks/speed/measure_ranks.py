"""What is measured on an engine of several ranks; see ``measure``."""

from collections import Counter

import torch

from vllm import LLM

from benchmarks.speed.measure import check, decode, new_prompts, params, room, ttft

__all__ = ["check", "collectives", "decode", "room", "ttft"]

_STEPS = 16


def collectives(llm: LLM, tokens: int, decode_tokens: int) -> dict:
    """Milliseconds that the first rank spends in what ranks do together, waiting included: in one
    prefill of ``tokens`` tokens, and in a decode step after ``decode_tokens``. Of these ``scores``
    and ``decode_scores`` reduce LazyLLM's scores. Gathers of hidden states count with the gathers
    of logits, which stock vLLM has too."""

    def run(tokens: int, count: int) -> None:
        llm.generate(new_prompts(1, tokens), params(count), use_tqdm=False)

    def profile(*args) -> Counter:
        llm.collective_rpc(_start_profile)
        run(*args)
        return llm.collective_rpc(_stop_profile)[0]

    run(tokens, 1)
    run(decode_tokens, 1 + _STEPS)
    prefill, first = profile(tokens, 1), profile(decode_tokens, 1)
    steps = profile(decode_tokens, 1 + _STEPS)
    step = {kind: (steps[kind] - first[kind]) / _STEPS for kind in steps | first}
    return {
        "value": sum(prefill.values()) - prefill["scores' kernels"],
        "scores": prefill["scores"] + prefill["scores' kernels"],
        "gathers": prefill["gathers"],
        "decode": sum(step.values()) - step.get("scores' kernels", 0),
        "decode_scores": step.get("scores", 0) + step.get("scores' kernels", 0),
        "decode_gathers": step.get("gathers", 0),
    }


def _start_profile(worker) -> None:
    from torch.profiler import ProfilerActivity, profile

    worker.lazyllm_profile = profile(activities=[ProfilerActivity.CUDA])
    worker.lazyllm_profile.start()


def _stop_profile(worker) -> Counter:
    """Milliseconds by kind of kernel."""
    torch.cuda.synchronize()
    profile = worker.lazyllm_profile
    profile.stop()
    found: Counter = Counter()
    for event in profile.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and (kind := kind_of(event.name)):
            found[kind] += event.time_range.elapsed_us() / 1000
    return found


def kind_of(kernel: str) -> str | None:
    """What a kernel does for ranks: NCCL's names have operation and dtype in them, vLLM's own
    all-reduce is called after its method; only scores are reduced in float32."""
    name = kernel.lower()
    if "dense_scores" in name:
        return "scores' kernels"
    if "nccl" in name and "allreduce" in name:
        return "scores" if "f32" in name else "reductions"
    if "nccl" in name and "allgather" in name:
        return "gathers"
    if "cross_device_reduce" in name or "all_reduce" in name or "allreduce" in name:
        return "reductions"
    return "others" if "nccl" in name else None
