"""What the kernels of a boundary read and write: one place that says what each tensor means."""

from dataclasses import dataclass

import torch

from lazyllm_vllm.kernels.prompt_pages import PromptState


@dataclass(frozen=True)
class PromptCounts:
    """How many tokens of each prompt are kept and have keys, a row a request: columns of one table
    (``runtime.request_table``), S stages.

    Attributes:
        num_prompt: ``[requests]`` int32, tokens of the prompt, as prefilled.
        state_room: ``[requests]`` int32, positions for whose state there is room.
        kept: ``[requests, S]`` int32, tokens of it that each stage keeps.
        capacity: ``[requests, S]`` int32, most of them that may ever have keys in the stage.
        prompt_keys: ``[requests, S]`` int32, how many have keys there now.
    """

    num_prompt: torch.Tensor
    state_room: torch.Tensor
    kept: torch.Tensor
    capacity: torch.Tensor
    prompt_keys: torch.Tensor

    @property
    def stride(self) -> int:
        """Numbers from a request to the next."""
        return self.kept.stride(0)


@dataclass(frozen=True)
class Choice:
    """Among which tokens boundaries choose for prefills, by batch index: of a whole prompt among
    all, of one that goes on (``plan.LongTurn``) among its own tokens but the last ones.

    Attributes:
        begin: ``[batch]`` int32, the first position whose state is not there yet. Those from here
            on that are not chosen among have keys in every stage.
        first, end: ``[batch]`` int32, the positions are ``first .. end - 1``.
        before: ``[stages, batch]`` int32, slots before those of the chosen.
        count: ``[stages, batch]`` int32, how many are chosen.
    """

    begin: torch.Tensor
    first: torch.Tensor
    end: torch.Tensor
    before: torch.Tensor
    count: torch.Tensor

    @classmethod
    def of(cls, numbers: torch.Tensor) -> "Choice":
        """Views of ``[3 + 2 * stages, batch]`` int32."""
        return cls(*numbers[:3], *numbers[3:].view(2, -1, numbers.shape[1]))


@dataclass(frozen=True)
class Search:
    """Scratch of ``top_k``, by batch index.

    Attributes:
        histogram: ``[batch, 2 * BINS]`` int32, zeros between boundaries.
        thresholds: ``[batch, 4]`` int32, threshold and ties of either list.
        split_counts: ``[batch, 3, MAX_SPLITS]`` int32, of each split's positions: 0 those above
            the threshold, 1 those on list 0's. In prefill 2 counts the candidates. For decodes 0
            and 2 are of list 1, above and on the higher threshold.
    """

    histogram: torch.Tensor
    thresholds: torch.Tensor
    split_counts: torch.Tensor


@dataclass(frozen=True)
class Selection:
    """What every selection kernel of a step is given.

    Attributes:
        state: of the prompts' positions.
        counts: of all requests; index: ``[batch]`` int32, the batch's rows of it, -1: no request.
        num_prompt, is_pruned: ``[batch]`` int32.
        state_room: ``[batch]`` int32, as in ``PromptCounts``.
        choice: of prefills; revivable: ``[batch]`` int32, the position before which tokens may be
            revived: ``num_prompt``, but of a long turn's last token (``plan.LongTurn``).
        active: ``[stages, batch]`` int32, whether the boundary before the stage chooses anew among
            the request's tokens in this step; of decodes 0: whether any does.
        limit: ``[stages, batch]`` int32, most tokens that the request may revive into the stage.
        quota: ``[1]`` int32, most tokens that a decode, but for turns, may revive at a boundary of
            this step, and so the rows set aside for each.
        first_row: ``[batch]`` int32, of decodes: the first of the rows set aside.
        least_revived: the least rank with which a token is revived.
        turn_tokens: ``[batch]`` int32, of a turn's last token (see ``begin_step``) how many tokens
            of the turn see what it revives, itself included.
        turn_limit: ``[stages, batch]`` int32, how many it revives, no fewer.
        turn_row: ``[batch]`` int32, its row in stage 0; -1: that of the decode.
        turn_end: ``[batch]`` int32, of a turn what ``revivable`` is to be.
        search: scratch.
    """

    state: PromptState
    counts: PromptCounts
    index: torch.Tensor
    num_prompt: torch.Tensor
    is_pruned: torch.Tensor
    state_room: torch.Tensor
    choice: Choice
    revivable: torch.Tensor
    active: torch.Tensor
    limit: torch.Tensor
    quota: torch.Tensor
    first_row: torch.Tensor
    least_revived: int
    turn_tokens: torch.Tensor
    turn_limit: torch.Tensor
    turn_row: torch.Tensor
    turn_end: torch.Tensor
    search: Search

    @property
    def num_stages(self) -> int:
        return self.active.shape[0]


@dataclass(frozen=True)
class Rows:
    """The rows of one stage, ``[decodes | revived | prefill tokens]``; or of all stages, every
    tensor with a leading dimension of stages.

    Attributes:
        position: ``[rows]`` int64.
        request: ``[rows]`` int32, batch index; -1: an unused row.
        slot: ``[rows]`` int32, slot in the stage.
        source: ``[rows]`` int32, row of the stage before that goes on as this one; -1: it comes
            from the Aux Cache.
        num_keys: ``[batch]`` int32, keys of each request in the stage.
        num_revived: ``[batch]`` int32.
    """

    position: torch.Tensor
    request: torch.Tensor
    slot: torch.Tensor
    source: torch.Tensor
    num_keys: torch.Tensor
    num_revived: torch.Tensor

    @classmethod
    def make(cls, stages: int, num_rows: int, batch: int, device: torch.device) -> "Rows":
        """Unused rows of all stages."""

        def ints(width: int, fill: int, dtype=torch.int32) -> torch.Tensor:
            return torch.full((stages, width), fill, dtype=dtype, device=device)

        return cls(
            position=ints(num_rows, 0, torch.int64),
            request=ints(num_rows, -1),
            slot=ints(num_rows, 0),
            source=ints(num_rows, -1),
            num_keys=ints(batch, 0),
            num_revived=ints(batch, 0),
        )

    def of_stage(self, stage: int) -> "Rows":
        return Rows(*(getattr(self, name)[stage] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class DecodeRows:
    """Rows ``0 .. num_decodes - 1`` are the current ones; those revived start at
    ``Selection.first_row``.

    Attributes:
        rows: of the stage.
        max_revived: most that a request may have.
        strict: prompt tokens are attended to only if this step selected them for the stage.
    """

    rows: Rows
    num_decodes: int
    max_revived: int
    strict: bool


@dataclass(frozen=True)
class Segments:
    """The prefill rows of a stage: prefill n has ``base + start[n] .. base + start[n + 1] - 1``, of
    the slots from ``first[n]`` on.

    Attributes:
        start: ``[prefills + 1]`` int32.
        first: ``[prefills]`` int32; more than 0 where earlier rows of a prompt have run already.
        shift: ``[prefills]`` int32, the slot of a token less its position, where no tokens are
            chosen.
    """

    start: torch.Tensor
    base: int
    first: torch.Tensor
    shift: torch.Tensor

    @property
    def count(self) -> int:
        return len(self.start) - 1

    def of(self, nth: int) -> slice:
        """Rows of one prefill; waits for the device."""
        first, last = (self.base + int(x) for x in self.start[nth : nth + 2])
        return slice(first, last)
