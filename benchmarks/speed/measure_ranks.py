"""What is measured on an engine of several ranks; see ``measure``."""

from collections import Counter
from collections.abc import Callable

import torch

from vllm import LLM

from benchmarks.speed.measure import check, decode, end_all, new_prompts, params, room, ttft

__all__ = ["check", "collectives", "decode", "room", "ttft"]

_STEPS = 16


def collectives(llm: LLM, tokens: int, decode_tokens: int) -> dict:
    """Milliseconds that the first rank spends in what ranks do together, waiting included: in one
    prefill of ``tokens`` tokens, and in a decode step after ``decode_tokens``. Of these ``scores``
    and ``decode_scores`` reduce LazyLLM's scores. Gathers of hidden states count with the gathers
    of logits, which stock vLLM has too."""

    def run() -> None:
        llm.generate(new_prompts(1, tokens), params(1), use_tqdm=False)

    run()
    prefill, steps = _profiled(llm, run), _decode_steps(llm, decode_tokens)
    step = Counter({kind: time / _STEPS for kind, time in steps.items()})
    return {
        "value": sum(prefill.values()) - prefill["scores' kernels"],
        "scores": prefill["scores"] + prefill["scores' kernels"],
        "gathers": prefill["gathers"],
        "decode": sum(step.values()) - step["scores' kernels"],
        "decode_scores": step["scores"] + step["scores' kernels"],
        "decode_gathers": step["gathers"],
    }


def _profiled(llm: LLM, run: Callable[[], object]) -> Counter:
    """Milliseconds by kind of kernel while ``run`` does, on the first rank."""
    llm.collective_rpc(_start_profile)
    run()
    return llm.collective_rpc(_stop_profile)[0]


def _decode_steps(llm: LLM, tokens: int) -> Counter:
    """The same of ``_STEPS`` steps that decode one request after ``tokens`` tokens."""
    engine, (prompt,), count = llm.llm_engine, new_prompts(1, tokens), 0
    engine.add_request("collectives", prompt, params(8 + 2 * _STEPS))
    while count < 3:
        for output in engine.step():
            count = len(output.outputs[0].token_ids)
    found = _profiled(llm, lambda: [engine.step() for _ in range(_STEPS)])
    end_all(llm, ["collectives"])
    return found


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
