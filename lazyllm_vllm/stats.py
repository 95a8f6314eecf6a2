"""Counters a user can see: what each request kept, revived and computed.

``request_stats(llm)`` returns them; ``vllm serve`` logs the totals every ``LOG_INTERVAL`` seconds
in which a request ended.
"""

import time
from collections import OrderedDict, deque
from typing import Any

import torch

from vllm.logger import init_logger

from lazyllm_vllm.request_table import kept_and_prompt_keys
from lazyllm_vllm.schedule import Schedule

logger = init_logger("vllm.lazyllm")

LOG_INTERVAL = 10.0
HISTORY = 4096  # requests remembered one by one


class RequestStats:
    """Counts by request. A row of the request table is copied to the CPU when its request leaves,
    and read once the copy is there, so that no step waits."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.requests: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self.total = self._empty()
        self._copies: deque = deque()
        self._last_log = -LOG_INTERVAL
        self._logged = 0

    def _empty(self) -> dict[str, Any]:
        zeros = [0] * self.schedule.num_stages
        return {
            "requests": 0, "prompt_tokens": 0, "kept": list(zeros), "revived": list(zeros),
            "share_computed": 1.0,
        }  # fmt: skip

    def record(self, req_id: str, num_prompt: int, row: torch.Tensor) -> None:
        """Count a request that leaves the engine, finished, aborted or preempted.

        Args:
            row: ``[1 + 3 * stages]`` int32 on the device: its row of the request table.
        """
        if row.is_cuda:
            copy = torch.empty(row.shape, dtype=row.dtype, pin_memory=True)
            copy.copy_(row, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        else:
            copy, event = row, None
        self._copies.append((req_id, num_prompt, copy, event))
        self._collect(wait=False)
        self._maybe_log()

    def _collect(self, wait: bool) -> None:
        while self._copies:
            req_id, num_prompt, copy, event = self._copies[0]
            if event is not None:
                if wait:
                    event.synchronize()
                elif not event.query():
                    return
            self._copies.popleft()
            self._count(req_id, num_prompt, copy.tolist())

    def _count(self, req_id: str, num_prompt: int, row: list[int]) -> None:
        entry = self._entry(req_id, num_prompt, row)
        self.requests[req_id] = entry
        if len(self.requests) > HISTORY:
            self.requests.popitem(last=False)
        self._add(self.total, entry)

    def _entry(self, req_id: str, num_prompt: int, row: list[int]) -> dict[str, Any]:
        kept, prompt_keys = kept_and_prompt_keys(row)
        return {
            "request_id": req_id,
            "prompt_tokens": num_prompt,
            "kept": kept,
            "revived": [now - then for now, then in zip(prompt_keys, kept)],
            "share_computed": self.schedule.share_computed(prompt_keys, num_prompt),
        }

    def _add(self, total: dict[str, Any], entry: dict[str, Any]) -> None:
        total["requests"] += 1
        total["prompt_tokens"] += entry["prompt_tokens"]
        for count in ("kept", "revived"):
            total[count] = [a + b for a, b in zip(total[count], entry[count])]
        keys = [k + r for k, r in zip(total["kept"], total["revived"])]
        total["share_computed"] = self.schedule.share_computed(keys, total["prompt_tokens"])

    def _maybe_log(self) -> None:
        now = time.monotonic()
        if now - self._last_log < LOG_INTERVAL or self.total["requests"] == self._logged:
            return
        self._last_log, self._logged = now, self.total["requests"]
        total = self.total
        logger.info(
            "LazyLLM: %d requests, %d prompt tokens, kept by stage %s, revived %s, "
            "%.1f%% of (prompt token, layer) pairs computed",
            total["requests"], total["prompt_tokens"], total["kept"], total["revived"],
            100 * total["share_computed"],
        )  # fmt: skip

    def report(self, live: dict[str, tuple[int, torch.Tensor]]) -> dict[str, Any]:
        """``{"requests": [one dict a request], "total": {...}}``; waits for the device.

        Args:
            live: prompt length and row of the requests that have not left, counted as they are.
        """
        self._collect(wait=True)
        requests, total = dict(self.requests), dict(self.total)
        for req_id, (num_prompt, row) in live.items():
            requests[req_id] = self._entry(req_id, num_prompt, row.tolist())
            self._add(total, requests[req_id])
        return {"requests": list(requests.values()), "total": total}


class WorkerExtension:
    """Methods that the plugin adds to vLLM's worker, called through ``collective_rpc``."""

    def lazyllm_stats(self) -> dict[str, Any]:
        return self.model_runner.model_state.report_stats()

    def lazyllm_trace(self) -> dict[str, Any]:
        return self.model_runner.model_state.trace.report()


def request_stats(llm) -> dict[str, Any]:
    """Counters of an ``LLM``'s requests: the last ``HISTORY`` one by one, and all together.

    A request that was preempted counts in ``total`` for each of its prefills, in ``requests`` for
    its last.

    Returns:
        ``{"requests": [...], "total": {...}}``. Each has ``prompt_tokens``, ``kept`` and
        ``revived`` (tokens, by stage), ``share_computed`` (of (prompt token, layer) pairs; the
        paper's "% of prompt tokens computed", section 5); a request has its ``request_id``, the
        total its number of ``requests``.

    Raises:
        RuntimeError: the engine runs without LazyLLM.
    """
    if "lazyllm" not in (llm.llm_engine.vllm_config.additional_config or {}):
        raise RuntimeError("this engine runs without LazyLLM: it was given no configuration")
    return llm.collective_rpc("lazyllm_stats")[0]
