"""Real engines for tests, each in a process of its own and shared by the tests that need it.

``start`` and the functions after it run in that process, ``EngineUnderTest`` in the test's.
"""

import itertools
import multiprocessing
import os
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.engine import Engine
from benchmarks.speed.start import randomize

ROOM = 2**29  # bytes of an engine's KV cache on a CPU, which takes a second a GiB to clear


class EngineUnderTest:
    """An engine with LazyLLM's configuration, or stock vLLM's.

    Args:
        lazyllm: the plugin's configuration; None: stock vLLM.
        arguments: others of ``start``.
        options: of ``LLM``.
    """

    def __init__(
        self, model: Path, lazyllm: dict | None = None, arguments: dict | None = None, **options
    ) -> None:
        self.log_file = Path(tempfile.mkstemp(suffix=".log")[1])
        self.options = options
        given = {"model": str(model), "lazyllm": lazyllm, "options": options}
        has_workers = options.get("tensor_parallel_size", 1) > 1
        given |= arguments or {}
        self.engine = Engine(start, given, __name__, self.log_file, has_workers)
        self._is_up = False

    def run(self, function: str, **arguments):
        """One of the functions below. Raises RuntimeError if it, or the engine's start, fails."""
        if not self._is_up:
            self.engine.ready()
            self._is_up = True
        return self.engine.run(function, **arguments)

    def generate(self, prompts: list[list[int]], max_tokens: int, **arguments) -> dict:
        return self.run("generate", prompts=prompts, max_tokens=max_tokens, **arguments)

    def fresh(self, room: int | None = None, budget: int | None = None, chunk: int = 0) -> None:
        """An empty prefix cache and other limits from here on.

        Args:
            room: see ``set_room``; chunk: see ``set_chunk``.
            budget: see ``set_budget``; None: what the engine was started with.
        """
        self.run("set_room", blocks=room)
        self.run("set_budget", tokens=budget or self.options["max_num_batched_tokens"])
        self.run("set_chunk", tokens=chunk)

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def close(self) -> None:
        self.engine.close()
        self.log_file.unlink(missing_ok=True)


def start(
    model: str,
    lazyllm: dict | None,
    options: dict,
    trace: bool = False,
    random_weights: bool = False,
    compiled_ops: bool = True,
    forks_workers: bool = False,
    schedules_ahead: bool = False,
):
    """A ``vllm.LLM``.

    Args:
        trace: record what every boundary decides.
        random_weights: fill the model with ``benchmarks.weights``.
        compiled_ops: whether small ops may be compiled for CUDA graphs, which rounds otherwise.
        forks_workers: on a CPU, fork the processes of tensor parallelism, which spares them vLLM's
            import.
        schedules_ahead: on a CPU, schedule a step while the one before runs, as on a GPU.
    """
    os.environ["LAZYLLM_TRACE"] = str(int(trace))
    import torch

    from vllm import LLM

    defaults = {"dtype": "float32", "max_model_len": 2304, "enforce_eager": True, "seed": 0}
    if torch.version.cuda is None:
        assert "harness.quick" in sys.modules, "a slow engine: it was not forked from what has it"
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # which comes before the option
        defaults["kv_cache_memory_bytes"] = ROOM

    from vllm.v1.executor import multiproc_executor

    if forks_workers:
        multiproc_executor.get_mp_context = partial(multiprocessing.get_context, "fork")
    elif torch.version.cuda is None:
        multiproc_executor.WorkerProc.worker_main = _work_quickly

    if torch.version.cuda is None and schedules_ahead:
        _schedule_ahead()

    if not compiled_ops:
        from lazyllm_vllm.models import staged

        staged.SmallOps = lambda model: None
    additional = {"lazyllm": lazyllm} if lazyllm is not None else {}
    llm = LLM(model, additional_config=additional, **defaults | options)
    if random_weights:
        llm.collective_rpc(randomize)
    return llm


def _work_quickly(*args, **kwargs) -> None:
    """In a process that vLLM started for a rank, and that has imported nothing yet."""
    from vllm.v1.executor.multiproc_executor import WorkerProc

    import harness.quick  # noqa: F401

    WorkerProc.worker_main(*args, **kwargs)


def _schedule_ahead() -> None:
    """vLLM has a CPU wait for each step."""
    from vllm.platforms.cpu import CpuPlatform

    adapt = CpuPlatform.check_and_update_config

    def adapt_and_schedule_ahead(vllm_config) -> None:
        adapt(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    CpuPlatform.check_and_update_config = staticmethod(adapt_and_schedule_ahead)


def _core(llm):
    return llm.llm_engine.engine_core.engine_core


def _runner(llm):
    return _core(llm).model_executor.driver_worker.worker.model_runner


def _state(llm):
    """The model's state; None: it is in other processes, one a rank."""
    has_ranks = _core(llm).vllm_config.parallel_config.world_size > 1
    return None if has_ranks else _runner(llm).model_state


def _free_blocks(llm) -> int:
    return _core(llm).scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def generate(
    llm,
    prompts: list[list[int]],
    max_tokens: int,
    logprobs: int | None = None,
    prompt_logprobs: int | None = None,
    together: bool = True,
    extra_args: list[dict | None] | None = None,
) -> dict:
    """Generate greedily for token-id prompts.

    Args:
        together: all are there before the first step; else one after the other.
        extra_args: of each prompt's ``SamplingParams``.

    Returns:
        ``tokens``, ``cached`` (prompt tokens found in the prefix cache) and ``logprobs`` by prompt;
        ``stats`` by prompt, and ``trace``, if any;
        ``free_blocks`` before and after; ``preemptions``; ``full``, the requests found to have no
        room left for revived tokens; ``seconds``.
    """
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            extra_args=extra,
        )
        for extra in extra_args or [None] * len(prompts)
    ]
    asked = [({"prompt_token_ids": prompt}, own) for prompt, own in zip(prompts, params)]
    batches = [asked] if together else [[one] for one in asked]
    before, began = _free_blocks(llm), time.monotonic()
    with _watch(llm) as seen:
        outputs = [
            output for batch in batches for output in llm.generate(*zip(*batch), use_tqdm=False)
        ]
    result = {
        "seconds": time.monotonic() - began,
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "free_blocks": [before, _free_blocks(llm)],
    } | seen
    if logprobs is not None:
        result["logprobs"] = [_numbers(output.outputs[0].logprobs) for output in outputs]
    if prompt_logprobs is not None:
        result["prompt_logprobs"] = [_numbers(output.prompt_logprobs[1:]) for output in outputs]
    return result | _by_prompt(llm, [output.request_id for output in outputs])


def _numbers(steps) -> list[dict[int, float]]:
    return [{token: x.logprob for token, x in step.items()} for step in steps]


def _by_prompt(llm, names: list[str]) -> dict:
    """Statistics and traces of the requests of these names."""
    from lazyllm_vllm import request_stats
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(llm.llm_engine.vllm_config) is None:
        return {}

    def in_order(by_id: dict) -> list:
        by_name = {req_id.split("-")[0]: stats for req_id, stats in by_id.items()}
        return [by_name.get(name) for name in names]

    requests = request_stats(llm)["requests"]
    result = {"stats": in_order({entry["request_id"]: entry for entry in requests})}
    state = _state(llm)
    if os.environ["LAZYLLM_TRACE"] == "1" if state is None else state.trace is not None:
        trace = llm.collective_rpc("lazyllm_trace")[0]
        result |= {what: in_order(trace[what]) for what in ("prefills", "decodes")}
    return result


@contextmanager
def _watch(llm):
    """Count preemptions, and requests whose room for revived tokens is seen to be full."""
    seen = {"preemptions": 0, "full": []}
    scheduler, watch = _core(llm).scheduler, getattr(_state(llm), "room_watch", None)
    preempt = scheduler._preempt_request

    def count(*args, **kwargs):
        seen["preemptions"] += 1
        return preempt(*args, **kwargs)

    scheduler._preempt_request = count
    if watch is not None:
        look = type(watch).step.__get__(watch)

        def step(*args):
            full = look(*args)
            seen["full"] += full
            return full

        watch.step = step
    try:
        yield seen
    finally:
        del scheduler._preempt_request
        if watch is not None:
            del watch.step


def explain(llm, prompt: list[int], max_tokens: int) -> dict:
    """The ``explanation`` of a prompt, as its JSON reads, beside ``tokens``, ``stats``,
    ``prefills`` and ``decodes`` as ``generate`` gives them of one prompt; in an engine with a
    trace."""
    from vllm import SamplingParams

    from lazyllm_vllm.observe.explain.local import explain_output

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
    explanation = explain_output(llm, "a model", output)
    of_prompt = {what: one for what, (one,) in _by_prompt(llm, [output.request_id]).items()}
    return of_prompt | {
        "tokens": list(output.outputs[0].token_ids),
        "explanation": explanation.model_dump(mode="json"),
    }


def explain_chat(llm, text: str) -> dict:
    """What a user says, explained as `lazyllm explain --chat` does, with one token of answer."""
    from lazyllm_vllm.observe.explain.local import explain_locally
    from lazyllm_vllm.observe.explain.prompt_file import Prompt

    messages = [{"role": "user", "content": text}]
    return explain_locally(llm, "a model", Prompt(text, messages), 1).model_dump(mode="json")


_SERVED = itertools.count()


def serve(llm, requests: list[dict]) -> dict:
    """Serve requests that arrive one after the other.

    Args:
        requests: each with its ``prompt`` and ``params`` (of ``SamplingParams``, but ``grammar``,
            of ``StructuredOutputsParams``), and perhaps ``at``, the number of steps before it,
            ``priority`` and ``cache_salt``.

    Returns:
        By request: ``tokens`` and ``text``, of each of its answers; ``found``, how many tokens
        each admission found in the prefix cache, and ``cached``, as it is told; ``computed``, its
        tokens in each step that had any; ``finished``, after how many steps; ``prompt_logprobs``
        of those that asked, else None.
        ``preemptions``: the ``request``, tokens ``computed`` and tokens ``said`` of each, and how
        many were ``promised`` to the prefix cache beyond what was computed;
        ``free_blocks`` before and after; ``prefills``, if traced.
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

    engine, before, steps = llm.llm_engine, _free_blocks(llm), 0
    names = [f"s{next(_SERVED)}" for _ in requests]
    waiting, outputs, finished = dict(zip(names, requests)), {}, {}
    with _watch_scheduler(llm) as (found, preemptions, computed):
        while waiting or engine.has_unfinished_requests():
            for name, request in list(waiting.items()):
                if request.get("at", 0) > steps:
                    continue
                prompt = {"prompt_token_ids": request["prompt"]}
                if "cache_salt" in request:
                    prompt["cache_salt"] = request["cache_salt"]
                params = {"output_kind": RequestOutputKind.FINAL_ONLY} | request["params"]
                if grammar := params.pop("grammar", None):
                    params["structured_outputs"] = StructuredOutputsParams(**grammar)
                params = SamplingParams(**params)
                engine.add_request(name, prompt, params, priority=request.get("priority", 0))
                del waiting[name]
            for output in engine.step():
                outputs[output.request_id], finished[output.request_id] = output, steps
            steps += 1
            assert steps < 400, "somebody waits in vain"
        engine.step()

    def name_of(req_id: str) -> int:
        return names.index(req_id.split("-")[0].split("_")[-1])

    answers = [sorted(outputs[name].outputs, key=lambda one: one.index) for name in names]
    return {
        "tokens": [[list(one.token_ids) for one in of_request] for of_request in answers],
        "text": [[one.text for one in of_request] for of_request in answers],
        "found": [[n for req_id, n in found if name_of(req_id) == i] for i in range(len(names))],
        "cached": [outputs[name].num_cached_tokens for name in names],
        "computed": [[n for r, n in computed if name_of(r) == i] for i in range(len(names))],
        "finished": [finished[name] for name in names],
        "prompt_logprobs": [_of_prompt(outputs[name]) for name in names],
        "preemptions": [one | {"request": name_of(one["request"])} for one in preemptions],
        "free_blocks": [before, _free_blocks(llm)],
    } | _by_prompt(llm, names)


def _of_prompt(output) -> list[float] | None:
    """The log-probability of each token of a prompt but the first."""
    if output.prompt_logprobs is None:
        return None
    tokens = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:])
    return [of_token[token].logprob for token, of_token in tokens]


@contextmanager
def _watch_scheduler(llm):
    """What admissions find in the prefix cache, preemptions, and what steps run; see ``serve``."""
    scheduler = _core(llm).scheduler
    manager, found, preemptions, computed = scheduler.kv_cache_manager, [], [], []
    record, preempt = manager.record_prefix_cache_stats, scheduler._preempt_request
    schedule = scheduler.schedule

    def note(request, num_hits):
        found.append((request.request_id, num_hits))
        return record(request, num_hits)

    def count(request, *args, **kwargs):
        computed, shared = request.num_computed_tokens, manager.coordinator.single_type_managers[0]
        promised = shared.num_cached_block.get(request.request_id, 0) * shared.block_size
        one = {"computed": computed, "said": request.num_output_tokens}
        one["promised"] = max(promised - computed, 0)
        preemptions.append({"request": request.request_id} | one)
        return preempt(request, *args, **kwargs)

    def step(*args, **kwargs):
        output = schedule(*args, **kwargs)
        computed.extend(output.num_scheduled_tokens.items())
        return output

    manager.record_prefix_cache_stats, scheduler._preempt_request = note, count
    scheduler.schedule = step
    try:
        yield found, preemptions, computed
    finally:
        del manager.record_prefix_cache_stats, scheduler._preempt_request, scheduler.schedule


def blocks_needed(llm, num_tokens: int) -> int:
    """For a prompt of so many tokens, over all groups, as the scheduler sees it."""
    groups = _core(llm).scheduler.kv_cache_config.kv_cache_groups
    return groups[0].kv_cache_spec.needs.total(num_tokens, num_tokens)


def set_room(llm, blocks: int | None) -> None:
    """Empty the prefix cache, and from now on leave so many blocks of the KV cache free; None:
    all."""
    pool = _core(llm).scheduler.kv_cache_manager.block_pool
    pool.free_blocks(getattr(pool, "held_by_test", []))
    assert llm.reset_prefix_cache()
    spare = 0 if blocks is None else pool.get_num_free_blocks() - blocks
    pool.held_by_test = pool.get_new_blocks(spare)


def watch_events(llm) -> None:
    """From now on keep the KV events that the scheduler publishes."""
    publisher = _core(llm).scheduler.kv_event_publisher
    publisher.kept = []
    publisher.publish = lambda batch: publisher.kept.extend(batch.events)


def kv_events(llm) -> list[dict]:
    """Those kept since the last call, as dicts with their ``type``."""
    import msgspec

    publisher = _core(llm).scheduler.kv_event_publisher
    events, publisher.kept = publisher.kept, []
    return [msgspec.structs.asdict(event) | {"type": type(event).__name__} for event in events]


def cached_blocks(llm) -> list[tuple[int, int]]:
    """Group and hash, as in events, of each block of the prefix cache."""
    from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash

    pool = _core(llm).scheduler.kv_cache_manager.block_pool
    keys = [block.block_hash for block in pool.blocks if block.block_hash is not None]
    return [(get_group_id(key), maybe_convert_block_hash(get_block_hash(key))) for key in keys]


def snapshots(llm) -> int:
    """How many there are to go on from."""
    managers = _core(llm).scheduler.kv_cache_manager.coordinator.single_type_managers
    return len(next(m.snapshots for m in managers if hasattr(m, "snapshots")))


def shared_blocks(llm) -> list[int]:
    """Those that are full of what requests may go on from, and none writes."""
    from harness.block_sets import ids, shared_sets

    sets = shared_sets(_core(llm).scheduler.kv_cache_manager)
    return sorted(block for each in sets for block in ids(each.blocks))


def block_contents(llm, blocks: list[int]) -> list[str]:
    """By block, a digest of its bytes and of the positions of its keys."""
    from hashlib import sha256

    copier = _state(llm).copier
    parts = zip(copier.blocks[blocks].cpu().numpy(), copier.slot_position[blocks].cpu().numpy())
    return [sha256(keys.tobytes() + at.tobytes()).hexdigest() for keys, at in parts]


def metrics(llm) -> dict[str, int]:
    """vLLM's counters by name."""
    return {one.name: one.value for one in llm.get_metrics() if hasattr(one, "value")}


def trace(llm, on: bool) -> None:
    """Start or stop to record what every boundary decides."""
    from lazyllm_vllm.observe.trace import Trace

    state = _state(llm)
    state.trace = state.boundary.trace = Trace(state.group) if on else None


def set_budget(llm, tokens: int) -> None:
    """From now on schedule at most so many tokens a step."""
    _core(llm).scheduler.max_num_scheduled_tokens = tokens


def set_most_requests(llm, count: int) -> None:
    """From now on run at most so many requests at once."""
    _core(llm).scheduler.max_num_running_reqs = count


def set_places(llm, count: int) -> None:
    """From now on a batch has so many places for requests and their parts."""
    _state(llm).max_num_reqs = count


def set_chunk(llm, tokens: int) -> None:
    """From now on, while there are several requests, schedule at most so many tokens of a prompt a
    step; 0: whatever fits."""
    _core(llm).scheduler.scheduler_config.long_prefill_token_threshold = tokens


def reset_prefix_cache(llm) -> bool:
    return llm.reset_prefix_cache()


def run_as_on_gpu(llm) -> None:
    """Warm up, and from now on run steps that drop nothing as where CUDA graphs are captured in
    pieces, though on a CPU none are."""
    from lazyllm_vllm.hooks import attention_layer
    from lazyllm_vllm.hooks.warm_up import warm_up
    from lazyllm_vllm.models import staged

    runner = _runner(llm)
    warm_up(
        runner.model,
        runner.model_state,
        runner.vllm_config,
        runner.input_buffers,
        runner.block_tables,
        runner.attn_groups,
        runner.kv_cache_config,
    )

    def in_pieces() -> bool:
        metadata = staged._stage_metadata()
        return metadata is not None and metadata.step.drops_nothing

    staged.captures_pieces = attention_layer.captures_pieces = in_pieces
    runner.model_state.model.pieces = None


def run_stages_in_pieces(llm) -> None:
    """From now on; see ``harness.pieces``."""
    from harness import pieces

    pieces.install(_state(llm).model)


def stages_in_pieces(llm) -> list[tuple[int, int]]:
    """Stage and rows of each that ran so."""
    return _state(llm).model.pieces.ran


def run_turns_as_in_graphs(llm, graphs: bool = True) -> None:
    """From now on, or not any more; see ``harness.turns``."""
    from harness import turns

    state = _state(llm)
    state.model.turn_graphs = turns.TurnsOnCPU(state) if graphs else None


def turns_as_in_graphs(llm) -> list[tuple[int, int]]:
    """Decodes and rows of the shapes of those that ran so."""
    return [tuple(shape) for shape in _state(llm).model.turn_graphs.ran]


def watch_turns(llm, graphs: bool) -> None:
    """From now on, see ``turns_watched``; with CUDA graphs of turns or without, on a GPU."""
    from triton import knobs

    model, llm.turns = _state(llm).model, {"shapes": [], "compiled": []}
    if not graphs:
        model.turn_graphs = None
    else:
        run = model.turn_graphs.run

        def watched(step, input_ids):
            llm.turns["shapes"].append(list(step.batch.shape))
            return run(step, input_ids)

        model.turn_graphs.run = watched

    def compiled(*, fn, **_) -> None:
        if fn.module.startswith("lazyllm_vllm"):
            llm.turns["compiled"].append(fn.name)

    knobs.runtime.jit_post_compile_hook = compiled


def turns_watched(llm) -> dict:
    """``shapes`` of what ran in graphs, and kernels of LazyLLM that were ``compiled``."""
    return llm.turns


def watch_steps(llm) -> None:
    """From now on; see ``steps``."""
    from harness.steps import Steps

    llm.steps = Steps(_state(llm))


def steps(llm) -> list[dict]:
    """See ``harness.steps.Steps.done``: since the last call."""
    return llm.steps.take()


def interrupt(llm, requests: list[dict], how: str) -> dict:
    """See ``harness.steps.interrupt``."""
    from harness.steps import interrupt

    return interrupt(llm, requests, how)


def abort(llm, prompts: list[list[int]], max_tokens: int) -> dict:
    """Abort the first request right after its prefill was scheduled, the second while it decodes,
    the third while it waits; the rest finish. Tokens by request."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    before, engine = _free_blocks(llm), llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(f"r{i}", {"prompt_token_ids": prompt}, params)
    engine.abort_request(["r2"])
    tokens, steps = {}, 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 1:
            engine.abort_request(["r0"])
        if steps == 4:
            engine.abort_request(["r1"])
    engine.step()
    return {"tokens": tokens, "free_blocks": [before, _free_blocks(llm)]}


def admit(llm, prompts: list[list[int]], max_tokens: int, most_steps: int) -> dict:
    """What becomes of requests that all arrive at once: by request, ``finished``, ``waiting``, or
    the error that refused it."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    engine, fate = llm.llm_engine, {}
    for i, prompt in enumerate(prompts):
        try:
            engine.add_request(f"a{i}", {"prompt_token_ids": prompt}, params)
            fate[f"a{i}"] = "waiting"
        except ValueError as error:
            fate[f"a{i}"] = str(error)
    for _ in range(most_steps):
        if not engine.has_unfinished_requests():
            break
        for output in engine.step():
            if output.finished:
                fate[output.request_id] = "finished"
    engine.abort_request(list(fate))
    engine.step()
    return fate


def facts(llm) -> dict:
    """``model_class``, ``async_scheduling``, ``room`` (tokens, as vLLM counts them)."""
    config = _core(llm).vllm_config
    return {
        "model_class": type(_state(llm).model).__name__,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "room": config.cache_config.kv_cache_size_tokens,
        "max_model_len": config.model_config.max_model_len,
    }


def call_worker(llm, method: str) -> list:
    """``collective_rpc``."""
    return llm.collective_rpc(method)


def forget_reduction(llm) -> None:
    """From now on each rank goes by the scores of its own heads."""
    llm.collective_rpc(_forget_reduction)


def _forget_reduction(worker) -> None:
    worker.model_runner.model_state.boundary.reduction = None
