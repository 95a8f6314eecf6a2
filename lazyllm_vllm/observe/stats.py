"""Counters a user can see: what each request kept, revived and computed.

``request_stats(llm)`` returns them; ``vllm serve`` logs the totals at most every ``LOG_INTERVAL``
seconds, if a request finished, and has them at ``/metrics`` (``metrics``).
"""

import time
from collections import OrderedDict, deque
from typing import Any

import torch

from vllm.logger import init_logger

from lazyllm_vllm.observe.metrics import METRICS
from lazyllm_vllm.plan.schedule import Schedule
from lazyllm_vllm.runtime.request_table import RequestRow, RowCopy

logger = init_logger("vllm.lazyllm")

LOG_INTERVAL = 10.0
SEND_INTERVAL = 1.0  # seconds between changes that tell of steps alone
HISTORY = 4096  # requests remembered one by one


class RequestStats:
    """Counts by request. A row of the request table is copied to the CPU when its request leaves,
    and read once the copy is there, so that no step waits.

    Attributes:
        selecting_steps: steps that chose tokens anew for a request that decodes.
        aux_blocks: blocks of the KV cache that hold prompt states and the Aux Cache now.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.requests: OrderedDict[str, dict[str, Any]] = OrderedDict()
        zeros = [0] * schedule.num_stages
        self.total = {
            "requests": 0,
            "pruned": 0,
            "prompt_tokens": 0,
            "kept": list(zeros),
            "revived": list(zeros),
            "reuses": 0,
            "reused": 0,
            "share_computed": 1.0,
        }
        self.selecting_steps = self.aux_blocks = 0
        self._copies: deque = deque()
        self._sent = self._counts()
        self._sent_news, self._sent_at = self._news, -SEND_INTERVAL
        self._last_log = -LOG_INTERVAL
        self._logged = 0

    def record(self, req_id: str, row: torch.Tensor | RequestRow, reused: int = 0) -> None:
        """Count a request that leaves the engine, finished, aborted or preempted.

        Args:
            row: its row of the request table: ``[2 + 3 * stages]`` int32 on the device, or what
                is known without it.
            reused: tokens that it had from a request from which it went on.
        """
        self._copies.append((req_id, RowCopy(row), reused))
        self._collect(wait=False)
        self._maybe_log()

    def _collect(self, wait: bool) -> None:
        while self._copies:
            req_id, copy, reused = self._copies[0]
            if not (wait or copy.is_here):
                return
            self._copies.popleft()
            entry = self._entry(req_id, copy, reused)
            self.requests[req_id] = entry
            if len(self.requests) > HISTORY:
                self.requests.popitem(last=False)
            self._add(self.total, entry)

    def _entry(self, req_id: str, copy: RowCopy, reused: int) -> dict[str, Any]:
        row = copy.read()
        return {
            "request_id": req_id,
            "prompt_tokens": row.num_prompt,
            "kept": row.kept,
            "revived": row.revived,
            "reused": reused,
            "share_computed": self.schedule.share_computed(row.prompt_keys, row.num_prompt),
        }

    def _add(self, total: dict[str, Any], entry: dict[str, Any]) -> None:
        total["requests"] += 1
        total["pruned"] += entry["kept"][-1] < entry["prompt_tokens"]
        total["reuses"] += entry["reused"] > 0
        total["reused"] += entry["reused"]
        if entry["reused"]:
            return
        total["prompt_tokens"] += entry["prompt_tokens"]
        for count in ("kept", "revived"):
            total[count] = [a + b for a, b in zip(total[count], entry[count])]
        keys = [k + r for k, r in zip(total["kept"], total["revived"])]
        total["share_computed"] = self.schedule.share_computed(keys, total["prompt_tokens"])

    @property
    def _news(self) -> tuple[int, int]:
        """What changes when requests come and leave, and with it all but the count of steps."""
        return self.total["requests"], self.aux_blocks

    def changes(self, wait: bool) -> dict[str, list[int]] | None:
        """What each of ``METRICS`` grew by since the last call, by its label's values; of a gauge
        its value. What did not change is left out; None: nothing did. That steps selected alone is
        told once a second: each change is a message from here to the front end.

        Args:
            wait: for copies that are on their way from the device. Then all is told.
        """
        self._collect(wait)
        clock, news = time.monotonic(), self._news
        if not wait and news == self._sent_news and clock < self._sent_at + SEND_INTERVAL:
            return None
        self._sent_news, self._sent_at = news, clock
        counts, sent = self._counts(), self._sent
        self._sent = counts
        return {
            metric.name: now if metric.is_gauge else [a - b for a, b in zip(now, sent[metric.name])]
            for metric in METRICS
            if (now := counts[metric.name]) != sent[metric.name]
        } or None

    def _counts(self) -> dict[str, list[int]]:
        """All of ``METRICS``, by their label's values."""
        total = self.total
        keys = [k + r for k, r in zip(total["kept"], total["revived"])]
        return {
            "requests": [total["requests"] - total["pruned"], total["pruned"]],
            "prompt_tokens": [total["prompt_tokens"]],
            "kept_tokens": total["kept"],
            "revived_tokens": total["revived"],
            "pairs": [total["prompt_tokens"] * self.schedule.num_layers],
            "computed_pairs": [self.schedule.pairs_computed(keys)],
            "reuses": [total["reuses"]],
            "reused_tokens": [total["reused"]],
            "selecting_steps": [self.selecting_steps],
            "aux_cache_blocks": [self.aux_blocks],
        }

    def _maybe_log(self) -> None:
        now, total = time.monotonic(), self.total
        if now - self._last_log < LOG_INTERVAL or total["requests"] == self._logged:
            return
        self._last_log, self._logged = now, total["requests"]
        logger.info(
            "LazyLLM: %d requests, %d prompt tokens, kept by stage %s, revived %s, "
            "%.1f%% of (prompt token, layer) pairs computed",
            total["requests"],
            total["prompt_tokens"],
            total["kept"],
            total["revived"],
            100 * total["share_computed"],
        )

    def report(self, live: dict[str, tuple[torch.Tensor, int]]) -> dict[str, Any]:
        """``{"requests": [one dict a request], "total": {...}}``; waits for the device.

        Args:
            live: rows and reused tokens of the requests that have not left, counted as they are.
        """
        self._collect(wait=True)
        requests, total = dict(self.requests), dict(self.total)
        for req_id, (row, reused) in live.items():
            requests[req_id] = self._entry(req_id, RowCopy(row), reused)
            self._add(total, requests[req_id])
        return {"requests": list(requests.values()), "total": total}


def request_stats(llm) -> dict[str, Any]:
    """Counters of an ``LLM``'s requests: the last ``HISTORY`` one by one, and all together.

    A request that was preempted counts in ``total`` for each of its prefills, in ``requests`` for
    its last. One that went on from another's snapshot, or its own, counts in ``total`` by what it
    ``reused`` alone: its prompt is the one that was pruned then.

    Returns:
        ``{"requests": [...], "total": {...}}``. Each has ``prompt_tokens``, ``kept`` and
        ``revived`` (tokens, by stage), ``share_computed`` (of (prompt token, layer) pairs; the
        paper's "% of prompt tokens computed", section 5), ``reused`` (tokens that it had of the
        request from which it went on); a request has its ``request_id``, the total its number of
        ``requests``, how many were ``pruned`` and how many went on from others (``reuses``). A
        request counts from the end of its prefill on.

    Raises:
        RuntimeError: the engine runs without LazyLLM.
    """
    from lazyllm_vllm.hooks.engine_config import lazyllm_config

    if lazyllm_config(llm.llm_engine.vllm_config) is None:
        raise RuntimeError("this engine runs without LazyLLM: it was given no configuration")
    return llm.collective_rpc("lazyllm_stats")[0]
