"""What pruned requests leave behind stage 0, in the scheduler's process: their blocks of the later
stages and of the prompt's group, for requests that go on from there.

Keys and values are written once, slot after slot, so that blocks that are full are shared: whoever
goes on reads the same ones. What may yet be written is copied.

Blocks that nobody holds are free to vLLM's pool, the last to be handed out; once one is, all
snapshots that have it are gone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock
from vllm.v1.request import Request

from lazyllm_vllm.plan.request_plan import Continuation, RequestPlan
from lazyllm_vllm.plan.request_setting import RequestSetting


@dataclass(eq=False)
class BlockSet:
    """Blocks that are taken and let go of together.

    Attributes:
        by_group: by KV cache group, of those that are private to a pruned prompt.
        snapshots: all that have them.
    """

    by_group: dict[int, list[KVCacheBlock]]
    snapshots: set["Snapshot"] = field(default_factory=set)

    @property
    def blocks(self) -> list[KVCacheBlock]:
        """Of all groups."""
        return [block for of_group in self.by_group.values() for block in of_group]

    def free_blocks(self, group: int) -> int:
        """How many of a group's blocks are free: all or none."""
        blocks = self.by_group[group]
        return 0 if not blocks or blocks[0].ref_cnt else len(blocks)


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Attributes:
    name: vLLM's hash of the last full block, and so of all tokens before its end; of a request that
        was preempted its id.
    plan: of the prompt that was pruned; setting: what its request had set.
    num_tokens: the prompt and what came after it.
    turns: how many requests have gone on from each other since that prompt.
    tail: the tokens behind the last full block.
    full: blocks that nobody writes any more, in order of their slots.
    rest: the others, behind them.
    prompt_block: the first in the prompt's group.
    """

    name: BlockHash | str
    plan: RequestPlan
    setting: RequestSetting
    num_tokens: int
    turns: int
    tail: list[int]
    full: tuple[BlockSet, ...]
    rest: BlockSet
    prompt_block: int

    @property
    def sets(self) -> tuple[BlockSet, ...]:
        """All, in the order in which they are to be handed out."""
        return self.rest, *reversed(self.full)

    @property
    def is_read(self) -> bool:
        """Whether a request that goes on from here, or from where this one did, is running."""
        return bool(self.full) and self.full[-1].blocks[0].ref_cnt > 0

    def full_of(self, group: int) -> list[KVCacheBlock]:
        return [block for each in self.full for block in each.by_group[group]]


@dataclass
class Taken:
    """A snapshot that a request goes on from. Its full blocks are shared.

    Attributes:
        plan: of the request.
        adopts: whether the request takes over the rest of the blocks; else it gets copies.
        sources: by group, blocks that are yet to be copied.
        copies: as in ``Continuation``.
    """

    snapshot: Snapshot
    plan: RequestPlan
    adopts: bool
    sources: dict[int, list[KVCacheBlock]] = field(default_factory=dict)
    copies: list[tuple[int, int]] = field(default_factory=list)

    def num_given(self, group: int) -> int:
        """Blocks of the snapshot's that the request has in its table."""
        given = (*self.snapshot.full, self.snapshot.rest) if self.adopts else self.snapshot.full
        return sum(len(each.by_group[group]) for each in given)

    def num_free(self, group: int) -> int:
        """Blocks that are free until the request holds them."""
        return sum(each.free_blocks(group) for each in self.snapshot.sets)


class Snapshots:
    """Those whose blocks are in one block pool.

    Attributes:
        taken: what requests go on from, by request, until they leave.
        turns: of them those whose prompt ends in the step that is being scheduled.
    """

    def __init__(self) -> None:
        self.turns = 0
        self._by_name: dict[BlockHash | str, list[Snapshot]] = {}
        self.taken: dict[str, Taken] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def keep(self, snapshot: Snapshot, pool: BlockPool) -> None:
        """Take over blocks that a request held. One of the same tokens before it is forgotten."""
        for before in self._by_name.setdefault(snapshot.name, []):
            if (before.tail, before.setting) == (snapshot.tail, snapshot.setting):
                self.forget(before)
                break
        self._by_name.setdefault(snapshot.name, []).append(snapshot)
        for each in snapshot.sets:
            each.snapshots.add(snapshot)
        self.release(snapshot.sets, pool)

    def release(self, sets: tuple[BlockSet, ...], pool: BlockPool) -> None:
        """Let go of blocks that were held once. Those that nobody else holds are free: if a
        snapshot has them the last to be handed out, in this order, and the snapshot goes with the
        first of them."""
        for each in sets:
            if each.snapshots:
                pool.unpin_blocks(each.blocks, lambda _, lost=each: self._lose(lost))
            else:
                pool.free_blocks(each.blocks)

    def _lose(self, lost: BlockSet) -> None:
        for snapshot in tuple(lost.snapshots):
            self.forget(snapshot)

    def forget(self, snapshot: Snapshot) -> None:
        alike = self._by_name.get(snapshot.name, [])
        if snapshot in alike:
            alike.remove(snapshot)
        if not alike:
            self._by_name.pop(snapshot.name, None)
        for each in snapshot.sets:
            each.snapshots.discard(snapshot)

    def forget_own(self, request_id: str) -> None:
        """A request has left. Another one may come by its id, and must not go on from what it left
        when it was preempted."""
        for snapshot in list(self._by_name.get(request_id, ())):
            self.forget(snapshot)

    @property
    def preempted(self) -> set[str]:
        """Ids of the requests that left one for themselves."""
        return {name for name in self._by_name if isinstance(name, str)}

    def own(self, request: Request) -> Snapshot | None:
        """What a request left when it was last preempted, if it has all of those tokens and more:
        vLLM may drop what a preempted request was about to say."""
        last = self._by_name.get(request.request_id, [None])[-1]
        return last if last is not None and last.num_tokens < request.num_tokens else None

    def find(
        self,
        request: Request,
        hashes: Sequence[BlockHash],
        block_size: int,
        setting: RequestSetting,
    ) -> Snapshot | None:
        """The longest that a request's tokens begin with, of a prompt that was pruned by the same
        setting and is at least half as long as the request's.

        Args:
            hashes: of the request's full blocks.
        """
        if not self._by_name:
            return None
        for full_blocks in range((request.num_tokens - 1) // block_size, 0, -1):
            begins = [
                each
                for each in self._by_name.get(hashes[full_blocks - 1], ())
                if each.setting == setting
                and each.num_tokens < request.num_tokens <= 2 * each.plan.num_prompt
                and each.tail == request.all_token_ids[full_blocks * block_size : each.num_tokens]
            ]
            if begins:
                return max(begins, key=lambda snapshot: snapshot.num_tokens)
        return None

    def hand_over(self, request_id: str, pool: BlockPool) -> Continuation | None:
        """What workers are told of a request that was just scheduled for the first time."""
        taken = self.taken.get(request_id)
        if taken is None:
            return None
        snapshot = taken.snapshot
        if not taken.adopts:
            self.release((snapshot.rest,), pool)
        plan = taken.plan if taken.plan.long_turn else None
        return Continuation(snapshot.num_tokens, snapshot.prompt_block, taken.copies, plan)
