"""What follows from the length of a request's prompt, or from what it goes on from."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple


class LongTurn(NamedTuple):
    """Of a prompt that goes on from another, and of whose own tokens some are dropped too.

    Attributes:
        begin: tokens of the prompt that was pruned before.
        first: tokens from which it goes on; those from ``begin`` on have keys in every stage.
        chosen: by stage, how many are chosen of its own tokens but the last ones.
        last: how many these are, which every stage keeps.
    """

    begin: int
    first: int
    chosen: tuple[int, ...]
    last: int


@dataclass(frozen=True)
class RequestPlan:
    """Made once a prefill, by ``Schedule.plan``, and handed on to whoever needs a part of it.

    Attributes:
        num_prompt: tokens that are prefilled: the prompt, and after a preemption also what had
            been generated.
        kept: prompt tokens that each stage keeps, all of them in stage 0; with ``keep_mass`` the
            most that it may keep.
        capacity: most prompt tokens that may ever have keys in each stage: the kept ones and a
            reserve for revived ones.
        state_room: positions for whose prompt state there is room.
        long_turn: None: the prompt goes on from no other, or keeps all of its own tokens.
    """

    num_prompt: int
    kept: tuple[int, ...]
    capacity: tuple[int, ...]
    state_room: int = 0
    long_turn: LongTurn | None = None

    @property
    def is_pruned(self) -> bool:
        """Whether any stage drops a token."""
        return self.kept[-1] < self.num_prompt

    @cached_property
    def slots_saved(self) -> tuple[int, ...]:
        """By stage, how many slots fewer than tokens the request needs, however long it gets."""
        return tuple(self.num_prompt - most for most in self.capacity)

    @property
    def aux_slots(self) -> int:
        """Slots in the Aux Cache: one for each prompt token that may have keys in stage 1, and so
        may be dropped behind it. What is dropped before is parked beside stage 0's keys."""
        return self.capacity[1] if self.is_pruned and len(self.capacity) > 2 else 0


class Continuation(NamedTuple):
    """What workers are told of a request that goes on from a snapshot.

    Attributes:
        num_tokens: tokens that have run behind stage 0, or were dropped there.
        prompt_block: the snapshot's first block in the prompt's group, by which workers know it.
        copies: of the snapshot's blocks those that may yet be written, to be copied before the
            request's first step, ``(source, destination)``.
        plan: of a long turn; None: the request has the plan of the prompt that was pruned.
    """

    num_tokens: int
    prompt_block: int
    copies: list[tuple[int, int]]
    plan: RequestPlan | None = None
