"""A line in the log for a request that waits in vain: nobody holds a block, and it is not taken.

Refusals at start and of single requests make sure that this never happens. If it does, all who wait
behind it wait too, and vLLM says nothing.
"""

import time

from vllm.logger import init_logger
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from lazyllm_vllm.plan.request_plan import RequestPlan

logger = init_logger("vllm.lazyllm")

PATIENCE = 10.0  # seconds before the first line
INTERVAL = 60.0  # seconds between lines


class Watchdog:
    """Of one block pool."""

    def __init__(self) -> None:
        self._who, self._since, self._said = None, 0.0, -INTERVAL

    def asks(self, pool: BlockPool, request: Request, plan: RequestPlan | None) -> None:
        """Called whenever a waiting request is about to ask for blocks.

        Args:
            plan: what it was refused with before, if it was.
        """
        if pool.get_num_free_blocks() < pool.num_gpu_blocks - 1:  # one is vLLM's null block
            self._who = None
            return
        now, who = time.monotonic(), (request.request_id, request.num_preemptions)
        if who != self._who:
            self._who, self._since = who, now
        elif now - self._since >= PATIENCE and now - self._said >= INTERVAL:
            self._said = now
            logger.warning(
                "LazyLLM: request %s has waited for %.0f s though all %d blocks of the KV cache "
                "are free, and others wait behind it: its %d tokens, of which stages keep %s, do "
                "not fit; abort it, and please report this",
                request.request_id,
                now - self._since,
                pool.num_gpu_blocks - 1,
                request.num_tokens,
                list(plan.kept) if plan else "?",
            )
