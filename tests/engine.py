"""Runs a real vLLM engine in a process of its own and returns what it saw.

``run(...)`` is for tests; ``python tests/engine.py`` is the child, which reads a request as JSON
from the file it is given and writes its answer beside it.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).parent


def run(
    model: Path,
    prompts: list[list[int]],
    lazyllm: dict | None = None,
    engine: dict | None = None,
    max_tokens: int = 8,
    logprobs: int | None = None,
    trace: bool = False,
    scenario: str = "generate",
    random_weights: bool = False,
    alone: list[list[int]] | None = None,
    compiled_ops: bool = True,
    as_on_gpu: bool = False,
) -> dict:
    """Generate greedily for token-id prompts, all added before the first step.

    Args:
        lazyllm: the plugin's configuration; None: stock vLLM.
        engine: further arguments of ``LLM``.
        scenario: ``generate``, or ``abort`` (see ``_abort``).
        random_weights: fill the model with ``benchmarks.weights``.
        as_on_gpu: warm up, and run steps that drop nothing as where CUDA graphs are captured in
            pieces, though on a CPU none are.
        compiled_ops: whether small ops may be compiled for CUDA graphs, which rounds otherwise.
        alone: prompts for which it then generates one by one.

    Returns:
        ``tokens`` and ``logprobs`` by prompt, those of ``alone`` last, ``stats``, ``trace``,
        ``free_blocks`` before and after, ``model_class``, ``preemptions``, ``room``; ``full``, the
        requests found to have no room left for revived tokens.
    """
    request = {
        "model": str(model), "prompts": prompts, "lazyllm": lazyllm, "engine": engine or {},
        "max_tokens": max_tokens, "logprobs": logprobs, "scenario": scenario,
        "random_weights": random_weights, "alone": alone or [],
        "compiled_ops": compiled_ops, "as_on_gpu": as_on_gpu,
    }  # fmt: skip
    env = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "LAZYLLM_TRACE": str(int(trace))}
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
        asked.write_text(json.dumps(request))
        child = subprocess.run(
            [sys.executable, __file__, str(asked), str(answer)],
            env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert child.returncode == 0, f"{child.stdout[-3000:]}\n{child.stderr[-6000:]}"
        return json.loads(answer.read_text()) | {"log": child.stdout + child.stderr}


def _main(asked: str, answer: str) -> None:
    from vllm import LLM, SamplingParams

    request = json.loads(Path(asked).read_text())
    additional = {"lazyllm": request["lazyllm"]} if request["lazyllm"] is not None else {}
    options = {"dtype": "float32", "max_model_len": 2304, "enforce_eager": True, "seed": 0}
    if not request["compiled_ops"]:
        from lazyllm_vllm.models import staged

        staged.SmallOps = lambda model: None
    llm = LLM(request["model"], additional_config=additional, **options | request["engine"])
    core = llm.llm_engine.engine_core.engine_core
    state = core.model_executor.driver_worker.worker.model_runner.model_state
    if request["as_on_gpu"]:
        _run_as_on_gpu(core.model_executor.driver_worker.worker.model_runner)
    if request["random_weights"]:
        # After what is installed, which the sources must not stand in for.
        sys.path.append(str(HERE.parent))
        from benchmarks.weights import randomize

        randomize(state.model)
    pool = core.scheduler.kv_cache_manager.block_pool
    free = [pool.get_num_free_blocks()]
    params = SamplingParams(
        temperature=0, max_tokens=request["max_tokens"], ignore_eos=True,
        logprobs=request["logprobs"],
    )  # fmt: skip
    preempted = []
    preempt = core.scheduler._preempt_request
    core.scheduler._preempt_request = lambda r, *args, **kwargs: (
        preempted.append(r.request_id), preempt(r, *args, **kwargs)
    )  # fmt: skip
    full = []
    if additional:
        look = state.room_watch.step
        state.room_watch.step = lambda *args: full.extend(found := look(*args)) or found
    prompts = [{"prompt_token_ids": p} for p in request["prompts"]]
    if request["scenario"] == "abort":
        result = _abort(llm, prompts, params)
    else:
        start = time.monotonic()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.monotonic() - start
        for prompt in request["alone"]:
            outputs += llm.generate({"prompt_token_ids": prompt}, params, use_tqdm=False)
        result = {
            "seconds": seconds,
            "tokens": [list(o.outputs[0].token_ids) for o in outputs],
        }
        if request["logprobs"] is not None:
            result["logprobs"] = [
                [{t: x.logprob for t, x in step.items()} for step in o.outputs[0].logprobs]
                for o in outputs
            ]
    free.append(pool.get_num_free_blocks())
    result |= {
        "free_blocks": free,
        "preemptions": len(preempted),
        "full": full,
        "model_class": type(state.model).__name__,
        "async_scheduling": core.scheduler.vllm_config.scheduler_config.async_scheduling,
        "room": core.vllm_config.cache_config.kv_cache_size_tokens,
    }
    if additional:
        from lazyllm_vllm.stats import request_stats

        result["stats"] = request_stats(llm)
        if os.environ["LAZYLLM_TRACE"] == "1":
            result["trace"] = llm.collective_rpc("lazyllm_trace")[0]
    Path(answer).write_text(json.dumps(result))


def _run_as_on_gpu(runner) -> None:
    from lazyllm_vllm.models import staged
    from lazyllm_vllm.warm_up import warm_up

    warm_up(
        runner.model, runner.model_state, runner.vllm_config, runner.input_buffers,
        runner.block_tables, runner.attn_groups, runner.kv_cache_config,
    )  # fmt: skip

    def in_pieces() -> bool:
        step = staged._current_step()
        return step is not None and not (step.decodes_select or step.prefills_select)

    staged.captures_pieces = in_pieces


def _abort(llm, prompts, params) -> dict:
    """Abort the first request right after its prefill was scheduled, the second while it decodes,
    a third while it waits; the rest finish."""
    engine = llm.llm_engine
    for i, prompt in enumerate(prompts):
        engine.add_request(f"r{i}", prompt, params)
    engine.abort_request(["r2"])
    tokens = {}
    steps = 0
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        steps += 1
        if steps == 1:
            engine.abort_request(["r0"])
        if steps == 4:
            engine.abort_request(["r1"])
    engine.step()
    return {"tokens_by_request": tokens, "steps": steps}


if __name__ == "__main__":
    _main(*sys.argv[1:])
