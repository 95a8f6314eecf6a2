"""Drives one engine, in its process, and checks it after whatever it does.

``start`` makes the engine; ``do`` is called with it from the process of the test.
"""

import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from functools import cached_property

import torch
from harness import engine as harness
from harness.engine import _core, _state

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.request import RequestStatus

from fuzz import invariants
from fuzz.model import ROOMS
from lazyllm_vllm.hooks.kv_cache.managers import planned_managers
from lazyllm_vllm.hooks.kv_cache.reuse import CONTINUATION, WHOLE

IDLE_STEPS = 4  # that may schedule nothing: steps in flight, and one that frees what was preempted
MOST_STEPS = 6000  # to finish what there is
COMPILING = 20.0  # seconds that a grammar may take


def start(**arguments):
    """``harness.engine.start``, but every request has the likeliest tokens, several of its answers
    too. On a CPU turns run as in their CUDA graphs."""
    from vllm.v1.worker.gpu.sample import sampler

    llm = harness.start(**arguments)
    sampler.gumbel_sample = lambda logits, *args, **kwargs: logits.argmax(-1)
    if torch.version.cuda is None and arguments["lazyllm"].get("reuse") == "deep":
        harness.run_turns_as_in_graphs(llm)
    llm.driver = Driver(llm)
    return llm


def do(llm, what: str, **arguments):
    """One of the ``Driver``'s methods."""
    return getattr(llm.driver, what)(**arguments)


def split_name(req_id: str) -> tuple[str, int]:
    """A request's name as it was added, and which of its answers it is, of vLLM's id."""
    *index, name = req_id.rsplit("-", 1)[0].split("_", 1)
    return name, int(index[0]) if index else 0


def _is_own(scheduler, req_id: str) -> bool:
    """Whether a request goes on from what it left itself when it was preempted."""
    taken = planned_managers(scheduler.kv_cache_manager)[0].snapshots.taken.get(req_id)
    return taken is None or taken.snapshot.name == req_id


class Driver:
    """Attributes:
    counts: what was done, by kind.
    outputs: of each request that finished, by name.
    prefills: of each answer, by name and index, how many tokens each of its prefills had, and
        whether it was not pruned for what others had left.
    went_on: answers whose request went on from what another had left (``reuse: deep``).
    """

    def __init__(self, llm) -> None:
        self.llm, self.engine, self.core = llm, llm.llm_engine, _core(llm)
        self.counts, self._known = Counter(), {}
        self.outputs, self.prefills, self.went_on = {}, defaultdict(list), set()
        self._idle, self._scheduled, self._waits_since = 0, 0, None
        self._wrap()

    def _wrap(self) -> None:
        scheduler, state = self.core.scheduler, _state(self.llm)
        schedule, preempt, add = scheduler.schedule, scheduler._preempt_request, state.add_request

        def count_scheduled(*args, **kwargs):
            output = schedule(*args, **kwargs)
            self._scheduled = output.total_num_scheduled_tokens
            held = planned_managers(scheduler.kv_cache_manager)[0].ran.keys()
            self.counts["held back"] += len(held & output.num_scheduled_tokens.keys())
            return output

        def count_preempted(*args, drop_stale_output: bool = False):
            what = "reset while they ran" if drop_stale_output else "preemptions"
            self.counts[what] += 1
            return preempt(*args, drop_stale_output=drop_stale_output)

        def note_prefill(index, new_req_data):
            known = new_req_data.prefill_token_ids
            goes_on = getattr(new_req_data, CONTINUATION, None)
            name = split_name(new_req_data.req_id)
            if goes_on is None:
                schedule, params = state.schedule, new_req_data.sampling_params
                setting = schedule.setting(params.extra_args)
                # From prompts that were not pruned, perhaps from what it had itself.
                is_unpruned = hasattr(new_req_data, WHOLE)
                is_unpruned &= schedule.plan(len(known), setting).is_pruned
                self.prefills[name].append((len(known), is_unpruned))
                self.counts["went on unpruned"] += is_unpruned
            elif name not in self.prefills or not _is_own(scheduler, new_req_data.req_id):
                # Else it was preempted, and goes on as if it had not been.
                self.counts["went on from another"] += 1
                self.counts["long turns"] += goes_on.plan is not None
                self.went_on.add(name)
            return add(index, new_req_data)

        scheduler.schedule, scheduler._preempt_request = count_scheduled, count_preempted
        state.add_request = note_prefill

    # What a life is made of.

    def begin(self, room: float, traced: bool) -> None:
        """An empty engine.

        Args:
            room: blocks of the KV cache, as a multiple of what the neediest prompt takes.
        """
        self.outputs.clear()
        self.prefills.clear()
        self.went_on.clear()
        harness.set_room(self.llm, int(room * self.least_room))
        harness.trace(self.llm, traced)

    @cached_property
    def least_room(self) -> int:
        """Blocks that hold any one request as long as a request may be."""
        needs, longest = _state(self.llm).needs, self.core.vllm_config.model_config.max_model_len
        names = ["off", *dict(needs.schedule.others)]
        settings = [None, *({"lazyllm": name} for name in names), {"lazyllm_keep": 9.0}]
        settings = [needs.schedule.setting(extra) for extra in settings]
        return max(
            needs.total_of(needs.schedule.plan(n, setting), n)
            for n in range(1, longest + 1)
            for setting in settings
        )

    def add(self, name: str, prompt: list[int], params: dict, priority: int = 0, salt=None):
        """Returns the error that refused it; None: it was taken.

        Args:
            params: of ``SamplingParams``, but ``grammar``, of ``StructuredOutputsParams``.
        """
        given = {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {})
        error = None
        try:
            self.engine.add_request(name, given, sampling(params), priority=priority)
        except (ValueError, VLLMValidationError) as refused:
            error = str(refused)
        self.counts["refused" if error else "requests"] += 1
        invariants.check(self.llm)
        return error

    def step(self, times: int = 1) -> dict[str, list[int]]:
        """Returns tokens of what finished, by name: the first of its answers."""
        finished = {}
        for _ in range(times):
            finished |= self._step()
        return finished

    def _step(self) -> dict[str, list[int]]:
        self._scheduled, finished = 0, {}
        for output in self.engine.step():
            self.outputs[output.request_id] = output
            finished[output.request_id] = list(output.outputs[0].token_ids)
        self.counts["steps"] += 1
        invariants.check(self.llm)
        self._check_progress()
        return finished

    def _check_progress(self) -> None:
        scheduler = self.core.scheduler
        there = [*scheduler.running, *scheduler.waiting]
        if self._scheduled or not there or scheduler.pause_state != PauseState.UNPAUSED:
            self._idle, self._waits_since = 0, None
            return
        grammar = RequestStatus.WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR
        if any(request.status == grammar for request in there):
            self._waits_since = self._waits_since or time.monotonic()
            assert time.monotonic() - self._waits_since < COMPILING, "a grammar is waited for"
            time.sleep(0.002)
            return
        self._idle += 1
        who = [(r.request_id, r.status.name, r.num_tokens, r.num_computed_tokens) for r in there]
        free = scheduler.kv_cache_manager.block_pool.get_num_free_blocks()
        assert self._idle <= IDLE_STEPS, f"nothing is scheduled, {free} blocks are free: {who}"

    def abort(self, names: list[str]) -> None:
        self.counts["aborts"] += len(names)
        self.engine.abort_request(names)
        for name in names:
            self.outputs.pop(name, None)
        invariants.check(self.llm)

    def reset(self, running: bool) -> None:
        self.counts["resets"] += 1
        with self._whole_cache():
            done = self.engine.reset_prefix_cache(reset_running_requests=running)
        assert done or not running
        invariants.check(self.llm)

    @contextmanager
    def _whole_cache(self):
        """vLLM resets its cache only if it knows who holds blocks, and ``set_room`` holds some."""
        pool = self.core.scheduler.kv_cache_manager.block_pool
        held = len(pool.held_by_test)
        pool.free_blocks(pool.held_by_test)
        pool.held_by_test = []
        try:
            yield
        finally:
            pool.held_by_test = pool.get_new_blocks(held)

    def pause(self, mode: str, clears: bool) -> None:
        """``keep``: nothing runs on; ``abort``: what there is is aborted, and new requests wait."""
        self.counts["pauses"] += 1
        with self._whole_cache():
            self.core.pause_scheduler(mode, clears)
        if mode == "abort":  # the front end, which in a server is told by the engine
            self.abort(list(self.engine.output_processor.external_req_ids))
        invariants.check(self.llm)

    def resume(self) -> None:
        self.core.resume_scheduler()

    def pace(self, budget: int, chunk: int) -> None:
        """Tokens a step, and of one prompt a step; 0: as many as fit."""
        harness.set_budget(self.llm, budget)
        harness.set_chunk(self.llm, chunk)

    # Its end.

    def finish(self) -> dict[str, dict]:
        """Run what there is to its end, and see that nothing of it is left.

        Returns:
            By request what it ``said``, of each answer the ``tokens``, ``text``, ``reason`` of its
            end, its ``prefills``, and whether it ``went_on`` from another's.
        """
        self.resume()
        steps = self.counts["steps"]
        while self.engine.has_unfinished_requests():
            self._step()
            assert self.counts["steps"] - steps < MOST_STEPS, "requests preempt each other for ever"
        for _ in range(3):  # steps in flight, and the one that tells the worker
            self._step()
        invariants.nothing_is_left(self.llm)
        return {
            name: [
                {
                    "tokens": list(one.token_ids),
                    "text": one.text,
                    "reason": one.finish_reason,
                    "prefills": self.prefills[name, one.index],
                    "went_on": (name, one.index) in self.went_on,
                }
                for one in output.outputs
            ]
            for name, output in self.outputs.items()
        }

    def alone(self, prompt: list[int], params: dict) -> list[int]:
        """Tokens that a request says by itself, cold, its prompt in one chunk."""
        key = repr((prompt, params))
        if key not in self._known:
            counts = self.counts.copy()
            self.begin(ROOMS[-1], traced=False)
            self.pace(self.core.vllm_config.scheduler_config.max_num_batched_tokens, 0)
            error = self.add("alone", prompt, params)
            assert error is None, error
            ((answer,),) = self.finish().values()
            self._known[key], self.counts = answer["tokens"], counts
        return self._known[key]

    def take_counts(self) -> dict[str, int]:
        """Since the last call."""
        counts, self.counts = self.counts, Counter()
        if ran := getattr(_state(self.llm).model.turn_graphs, "ran", None):
            counts["turns as in graphs"] = sum(shape.turns == 1 for shape in ran)
            counts["several as in graphs"] = len(ran) - counts["turns as in graphs"]
            ran.clear()
        return dict(counts)


def sampling(params: dict) -> SamplingParams:
    """Such that the likeliest token is sampled: vLLM gives several answers to no request that says
    that it is greedy."""
    params = {"output_kind": RequestOutputKind.FINAL_ONLY, "ignore_eos": True} | params
    if grammar := params.pop("grammar", None):
        params["structured_outputs"] = StructuredOutputsParams(**grammar)
    return SamplingParams(temperature=0.0 if params.get("n", 1) == 1 else 0.01, **params)
