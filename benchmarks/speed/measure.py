"""What is measured on a running engine. Times are wall-clock, in milliseconds, of the whole engine:
scheduling, the model, sampling. No prompt is asked twice, since its prefix would be cached."""

import itertools
import math
import time
from collections.abc import Iterable

import torch

from vllm import LLM, SamplingParams

_SEEDS = itertools.count()


def new_ids(count: int, tokens: int) -> list[list[int]]:
    """Random ones, others in every call."""
    random = torch.Generator().manual_seed(next(_SEEDS))
    return torch.randint(3, 30000, (count, tokens), generator=random).tolist()


def new_prompts(count: int, tokens: int) -> list[dict]:
    """The same as ``LLM`` takes them."""
    return [{"prompt_token_ids": prompt} for prompt in new_ids(count, tokens)]


def check_cold(outputs: Iterable) -> None:
    """Raises RuntimeError if the cache had a part of a prompt."""
    if cached := sum(output.num_cached_tokens or 0 for output in outputs):
        raise RuntimeError(f"{cached} prompt tokens were cached, which falsifies the measurement")


def params(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)


def core(llm: LLM):
    return llm.llm_engine.engine_core.engine_core


def ttft(llm: LLM, tokens: int) -> dict:
    """Time to the first token of one request."""
    prompt = new_prompts(1, tokens)
    start = time.monotonic()
    outputs = llm.generate(prompt, params(1), use_tqdm=False)
    end = time.monotonic()
    check_cold(outputs)
    return {"value": 1000 * (end - start)}


def check(llm: LLM, tokens: int) -> None:
    """One prompt on an engine with LazyLLM. Raises RuntimeError if a log-probability is not finite,
    or what was kept is not what the schedule says."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import schedule_of

    sampling = params(2)
    sampling.logprobs = 1
    (output,) = llm.generate(new_prompts(1, tokens), sampling, use_tqdm=False)
    logprobs = [x.logprob for step in output.outputs[0].logprobs for x in step.values()]
    if not all(map(math.isfinite, logprobs)):
        raise RuntimeError(f"{tokens} tokens: log-probabilities {logprobs}")
    kept = list(request_stats(llm)["requests"][-1]["kept"])
    right = list(schedule_of(core(llm).vllm_config).plan(tokens).kept)
    if kept != right:
        raise RuntimeError(f"{tokens} tokens: {kept} were kept, not {right}")


def decode(llm: LLM, tokens: int, batch: int, steps: int) -> dict:
    """Time per output token while ``batch`` requests of ``tokens`` tokens decode together, over
    ``steps`` steps that begin when the last of them has its third token; how many tokens each
    request revived in one step, in one stage, on average."""
    engine = llm.llm_engine
    ids = [f"decode-{i}" for i in range(batch)]
    for name, prompt in zip(ids, new_prompts(batch, tokens)):
        engine.add_request(name, prompt, params(steps + 4 * batch + 8))
    count = {}
    start = end = None
    while end is None:
        outputs = engine.step()
        for output in outputs:
            count[output.request_id] = len(output.outputs[0].token_ids)
        least = min((count.get(name, 0) for name in ids), default=0)
        if start is None and least >= 3:
            revived, first = _revived(llm), least
            start = time.monotonic()
        elif start is not None and least >= first + steps:
            end = time.monotonic()
            done = least - first
    check_cold(outputs)
    result = {"value": 1000 * (end - start) / done}
    if revived is not None:
        result["revived"] = (_revived(llm) - revived) / (done * batch)
    end_all(llm, ids)
    return result


def end_all(llm: LLM, names: list[str]) -> None:
    """Abort requests, and wait until the engine has nothing to do."""
    engine = llm.llm_engine
    engine.abort_request(names)
    while engine.has_unfinished_requests():
        engine.step()


def _revived(llm: LLM) -> float | None:
    """Prompt tokens revived so far, a stage."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(core(llm).vllm_config) is None:
        return None

    by_stage = request_stats(llm)["total"]["revived"]
    return sum(by_stage) / max(len(by_stage) - 1, 1)


def throughput(llm: LLM, requests: int, tokens: int, max_tokens: int, shared: int = 0) -> dict:
    """Output tokens a second with all requests there from the start; most that ran at once. The
    first ``shared`` tokens of all are the same, and cached by a request before them."""
    engine, scheduler = llm.llm_engine, core(llm).scheduler
    (prefix,) = new_ids(1, shared)
    prompts = [{"prompt_token_ids": prefix + own} for own in new_ids(requests, tokens - shared)]
    if shared:
        llm.generate({"prompt_token_ids": prefix}, params(1), use_tqdm=False)
    peak, last = 0, {}
    start = time.monotonic()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"throughput-{i}", prompt, params(max_tokens))
    while engine.has_unfinished_requests():
        last |= {output.request_id: output for output in engine.step()}
        peak = max(peak, len(scheduler.running))
    seconds = time.monotonic() - start
    if not shared:
        check_cold(last.values())
    cached = sum(output.num_cached_tokens or 0 for output in last.values())
    return {
        "value": requests * max_tokens / seconds,
        "peak_running": peak,
        "cached": cached / requests,
    }


def room(llm: LLM, tokens: int) -> dict:
    """Requests of ``tokens`` tokens whose caches fit at once: allocated, in the engine's own KV
    cache manager, until it has no more. Each is prefilled by as many tokens as a step has, so that
    layers with a sliding window give back what lies behind it, as they do for the scheduler."""
    from vllm.v1.request import Request

    scheduler = core(llm).scheduler
    manager, held = scheduler.kv_cache_manager, []
    while True:
        request = Request(
            request_id=f"room-{len(held)}",
            prompt_token_ids=[3] * tokens,
            sampling_params=params(1),
            pooling_params=None,
        )
        held.append(request)
        if not _allocate(manager, request, scheduler.max_num_scheduled_tokens):
            break
    for request in held:
        manager.free(request)
    return {"value": len(held) - 1}


def _allocate(manager, request, most: int) -> bool:
    """Whether all of a request's tokens got slots, at most ``most`` at a time."""
    while new := min(most, request.num_tokens - request.num_computed_tokens):
        is_first = request.num_computed_tokens == 0
        blocks = manager.allocate_slots(
            request, new, full_sequence_must_fit=is_first, delay_cache_blocks=True
        )
        if blocks is None:
            return False
        request.num_computed_tokens += new
    manager.remove_skipped_blocks(request.request_id, request.num_tokens, request.num_tokens)
    return True


def profile(llm: LLM, tokens: int, decode_tokens: int) -> dict:
    """Kernels of one prefill, and of one decode step, as text."""
    steps = 16

    def run(tokens: int, count: int) -> None:
        llm.generate(new_prompts(1, tokens), params(count), use_tqdm=False)

    run(tokens, 1)
    run(decode_tokens, 1 + steps)
    one = _kernels(lambda: run(tokens, 1))
    first = _kernels(lambda: run(decode_tokens, 1))
    many = _kernels(lambda: run(decode_tokens, 1 + steps))
    for name, (us, count) in first.items():
        before = many.get(name, (0, 0))
        many[name] = (before[0] - us, before[1] - count)
    step = {n: (us / steps, c / steps) for n, (us, c) in many.items() if c > 0}
    return {
        "value": 0,
        "text": _table(f"Prefill of {tokens:,} tokens", one)
        + "\n"
        + _table(f"A decode step after {decode_tokens:,} tokens, mean of {steps}", step),
    }


def _kernels(run) -> dict[str, tuple[float, float]]:
    """Microseconds and launches of each kernel."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    kernels: dict[str, tuple[float, float]] = {}
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            us, count = kernels.get(event.name, (0.0, 0))
            kernels[event.name] = (us + event.time_range.elapsed_us(), count + 1)
    return kernels


def _table(title: str, kernels: dict[str, tuple[float, float]], most: int = 30) -> str:
    total = sum(us for us, _ in kernels.values())
    lines = [
        f"{title}: {total / 1000:.3f} ms in kernels",
        f"{'us':>12} {'launches':>9} {'share':>7}",
    ]
    for name, (us, count) in sorted(kernels.items(), key=lambda x: -x[1][0])[:most]:
        lines.append(f"{us:12.1f} {count:9.1f} {us / total:7.2%}  {name[:100]}")
    rest = sorted(kernels.values(), reverse=True)[most:]
    lines.append(f"{sum(us for us, _ in rest):12.1f} {'':9} {'':7}  {len(rest)} others")
    return "\n".join(lines) + "\n"
