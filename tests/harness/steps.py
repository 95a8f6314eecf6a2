"""What each step of an engine runs: which requests' tokens, and how much work."""

import time


class Steps:
    """Of one engine, from now on.

    Attributes:
        done: of each step ``tokens``, by request, ``layer_rows``, ``rows`` of each stage, with
            those that run before the others, and whether it ``is_plain``.
    """

    def __init__(self, state) -> None:
        self.done, self._state, self._begin = [], state, state.boundary.begin
        state.boundary.begin = self._note

    def _note(self, step) -> None:
        sizes, plan, prefills = self._state.schedule.stage_sizes, step.plan, step.batch.prefills
        behind = sum(part.num_rows for part in plan.catch_up)
        rows = [
            step.num_rows(stage) + sum(part.num_rows for part in parts) + behind * (stage > 0)
            for stage, parts in enumerate(plan.parts)
        ]
        if step.is_plain:
            tokens = step.segments[0].start.diff().tolist()
        else:
            tokens = (prefills.end - prefills.first).tolist()
        tokens = dict(zip(step.batch.req_ids, [1] * step.num_decodes + tokens, strict=True))
        layer_rows = sum(size * count for size, count in zip(sizes, rows))
        step_done = {"tokens": tokens, "layer_rows": layer_rows, "rows": rows}
        self.done.append(step_done | {"is_plain": step.is_plain})
        return self._begin(step)

    def take(self) -> list[dict]:
        """Those since the last call."""
        done, self.done = self.done, []
        return done


def interrupt(llm, requests: list[dict], how: str) -> dict:
    """Serve requests (``engine.serve``), and when a prompt has been held back for a step or two, so
    that a part of its later stages has run, ``abort`` or ``preempt`` its request, or ``reset`` the
    prefix cache with all that runs.

    Returns:
        ``tokens`` by request, ``interrupted``, which one was, ``ran``, the rows that it had run in
        each stage, ``free_blocks`` before and after.
    """
    from vllm import SamplingParams

    from harness.engine import _core, _free_blocks
    from lazyllm_vllm.hooks.kv_cache.managers import planned_managers

    engine, scheduler = llm.llm_engine, _core(llm).scheduler
    ran = planned_managers(scheduler.kv_cache_manager)[0].ran
    before, tokens, who, rows, steps = _free_blocks(llm), {}, None, None, 0
    for i, request in enumerate(requests):
        prompt = {"prompt_token_ids": request["prompt"]}
        engine.add_request(f"i{i}", prompt, SamplingParams(**request["params"]))
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens[output.request_id] = list(output.outputs[0].token_ids)
        if who is None and ran and all(sum(of_one[1:]) for of_one in ran.values()):
            (who, rows), *_ = ran.items()
            _interrupt(llm, scheduler, who, how)
            assert not ran
        steps += 1
        assert steps < 400, "somebody waits in vain"
    engine.step()
    return {
        "tokens": [tokens.get(f"i{i}") for i in range(len(requests))],
        "interrupted": int(who.split("-")[0][1:]),
        "ran": rows,
        "free_blocks": [before, _free_blocks(llm)],
    }


def _interrupt(llm, scheduler, req_id: str, how: str) -> None:
    if how == "abort":
        llm.llm_engine.abort_request([req_id.split("-")[0]])
    elif how == "preempt":
        request = scheduler.requests[req_id]
        scheduler.running.remove(request)
        scheduler._preempt_request(request, time.monotonic())
    else:
        assert llm.llm_engine.reset_prefix_cache(reset_running_requests=True)
