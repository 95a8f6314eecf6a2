"""What pruned requests leave behind stage 0 when they end, in the scheduler's process: their blocks
of the later stages and of the prompt's group, for requests that go on from there.

The blocks are free to vLLM's pool, the last to be handed out; once one is, the snapshot is gone.
"""

from dataclasses import dataclass
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from lazyllm_vllm.plan.request_plan import RequestPlan
from lazyllm_vllm.plan.request_setting import RequestSetting


class Continuation(NamedTuple):
    """What workers are told of a request that goes on from a snapshot.

    Attributes:
        num_tokens: tokens that have run behind stage 0, or were dropped there.
        prompt_block: the snapshot's first block in the prompt's group, by which workers know it.
        copies: blocks to be copied before the request's first step, ``(source, destination)``.
    """

    num_tokens: int
    prompt_block: int
    copies: list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Attributes:
    plan: of the prompt that was pruned; setting: what its request had set.
    num_tokens: the prompt and what came after it.
    last_hash: vLLM's hash of the last full block of these tokens, and so of all before them.
    tail: the tokens behind that block.
    blocks: by KV cache group, of those that are private to a request.
    prompt_block: the first in the prompt's group.
    """

    plan: RequestPlan
    setting: RequestSetting
    num_tokens: int
    last_hash: BlockHash
    tail: list[int]
    blocks: dict[int, list[int]]
    prompt_block: int

    def begins(self, request: Request) -> bool:
        """Whether a request's tokens, known to begin with the snapshot's full blocks, begin with
        all of its tokens, and go on."""
        first = self.num_tokens - len(self.tail)
        rest = request.all_token_ids[first : self.num_tokens + 1]
        return len(rest) > len(self.tail) and rest[: len(self.tail)] == self.tail


class Snapshots:
    """Those whose blocks are in one block pool.

    Attributes:
        taken: the snapshots that requests go on from, by request, until they leave.
        copies: of requests that go on in the step being scheduled, by request, blocks to be copied.
    """

    def __init__(self) -> None:
        self._by_hash: dict[BlockHash, Snapshot] = {}
        self.taken: dict[str, Snapshot] = {}
        self.copies: dict[str, list[tuple[int, int]]] = {}

    def __len__(self) -> int:
        return len(self._by_hash)

    def keep(self, snapshot: Snapshot, pool: BlockPool) -> None:
        """Take over blocks that a request held. One of the same tokens before it is forgotten."""
        self._by_hash[snapshot.last_hash] = snapshot
        self.release(snapshot, pool)

    def find(self, request: Request, block_size: int, setting: RequestSetting) -> Snapshot | None:
        """The longest that a request's tokens begin with, of a prompt pruned by the same setting
        and at least half as long."""
        if not self._by_hash:
            return None
        for last_hash in reversed(request.block_hashes[: (request.num_tokens - 1) // block_size]):
            snapshot = self._by_hash.get(last_hash)
            if snapshot is None or snapshot.setting != setting:
                continue
            if request.num_tokens <= 2 * snapshot.plan.num_prompt and snapshot.begins(request):
                return snapshot
        return None

    def sources(self, request_id: str, group: int, pool: BlockPool) -> list[KVCacheBlock]:
        """Blocks that a request goes on from in a group; none if it does not."""
        snapshot = self.taken.get(request_id)
        return [] if snapshot is None else [pool.blocks[at] for at in snapshot.blocks[group]]

    def release(self, snapshot: Snapshot, pool: BlockPool) -> None:
        """Let go of a snapshot's blocks, held once more than before; they are then the last to be
        handed out."""
        blocks = [pool.blocks[at] for of_group in snapshot.blocks.values() for at in of_group]
        pool.unpin_blocks(blocks, lambda _: self._forget(snapshot))

    def hand_over(self, request_id: str, pool: BlockPool) -> Continuation | None:
        """What workers are told of a request that was just scheduled for the first time."""
        copies = self.copies.pop(request_id, None)
        if copies is None:
            return None
        snapshot = self.taken[request_id]
        self.release(snapshot, pool)
        return Continuation(snapshot.num_tokens, snapshot.prompt_block, copies)

    def _forget(self, snapshot: Snapshot) -> None:
        if self._by_hash.get(snapshot.last_hash) is snapshot:
            del self._by_hash[snapshot.last_hash]
