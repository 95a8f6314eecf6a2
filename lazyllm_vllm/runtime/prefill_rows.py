"""Which rows of each prefill run in each stage in a step, decided on the CPU.

A prompt that is pruned runs stage 0 chunk by chunk; its last chunk runs the later stages, on the
tokens that are kept. Where these are spread over several steps (``plan.spread``), its last token
comes again in each, with some of the rows, stage after stage. A prompt that is not pruned runs all
stages chunk by chunk. What shared keys spared it in stage 0 it must still run in the later stages,
which are its own: it catches up, with no more of it in a step than the step has tokens
(``later_end``). A prompt that goes on from what an earlier request left runs all
stages chunk by chunk, too: behind stage 0 only what comes after that, in slots after what it took
over.

No layer sees more rows at once than a step's budget of tokens: where a stage has more, parts of
them run through it first, and the rest, with every prompt's last tokens, runs beside the decodes.
"""

from dataclasses import dataclass, replace

import numpy as np


@dataclass(frozen=True)
class Prefills:
    """The prefills of a step, each array ``[prefills]`` int32 where nothing else is said.

    Attributes:
        num_prompt: tokens to be prefilled, over all chunks.
        first, end: this chunk has the tokens at positions ``first .. end - 1``.
        caught_up: tokens that need not run in the later stages any more, of prompts that are not
            pruned now.
        is_pruned: bool, whether the prompt is pruned in this prefill.
        sees_revived: bool, whether the rows are the last ones of a turn, and see what it revives;
            see ``kernels.begin_step``. Behind stage 0 the last of them is a decode's row.
        leads: bool, whether the rows are those of a long turn before these, of which the later
            stages run some.
        begin: tokens of the prompt that was pruned before a long turn; else 0.
        before: ``[stages, prefills]``, slots before those of the tokens that are chosen: of a long
            turn; else 0.
        kept: ``[stages, prefills]``, slots with them: tokens that a pruned prompt keeps in each
            stage.
        shift: ``[stages, prefills]``, the slot of a token less its position; 0 but behind stage 0
            of a prompt that goes on.
        ran, until: ``[stages, prefills]``, rows of a pruned prompt's stages that ran in steps
            before, and that have run after this one, in the steps that run its later stages.
    """

    num_prompt: np.ndarray
    first: np.ndarray
    end: np.ndarray
    caught_up: np.ndarray
    is_pruned: np.ndarray
    sees_revived: np.ndarray
    leads: np.ndarray
    begin: np.ndarray
    before: np.ndarray
    kept: np.ndarray
    shift: np.ndarray
    ran: np.ndarray
    until: np.ndarray

    @classmethod
    def whole(cls, lengths: list[int], num_stages: int) -> "Prefills":
        """Prompts that come in one piece, and of which nothing is dropped."""
        n = np.array(lengths, np.int32)
        none = np.zeros_like(n)
        kept, zeros = (np.tile(x, (num_stages, 1)) for x in (n, none))
        never = none.astype(bool)
        return cls(n, none, n, none, never, never, never, none, zeros, kept, zeros, zeros, kept)

    def padded(self, counts: list[int]) -> "Prefills":
        """With some more, of nobody, which have so many rows."""
        whole = Prefills.whole(counts, len(self.kept))

        def joined(field: str) -> np.ndarray:
            return np.concatenate([getattr(self, field), getattr(whole, field)], axis=-1)

        return Prefills(*(joined(field) for field in self.__dataclass_fields__))

    @property
    def is_last_chunk(self) -> np.ndarray:
        return (self.end == self.num_prompt) | self.leads

    @property
    def prunes(self) -> np.ndarray:
        """Whether later stages run on tokens that are chosen."""
        return self.is_pruned & self.is_last_chunk

    @property
    def is_held_back(self) -> np.ndarray:
        """Whether rows of the later stages are left to other steps."""
        return self.prunes & (self.until[-1] < self.kept[-1])

    @property
    def crosses(self) -> np.ndarray:
        """``[stages, prefills]``, whether tokens are chosen for the stage in this step."""
        return self.prunes & (self.ran < np.minimum(self.until, self.kept))

    @property
    def completes(self) -> np.ndarray:
        """``[stages, prefills]``, whether the last tokens that are chosen run in this step."""
        return self.crosses & (self.until >= self.kept)

    def later_end(self, budget: int) -> np.ndarray:
        """``[prefills]``, position up to which the later stages have run after this step, of
        prompts that are not pruned in it: this chunk's end, unless more than ``budget`` tokens are
        to catch up with and the prompt has more to come."""
        waits = ~self.is_pruned & ~self.is_last_chunk & (self.first - self.caught_up > budget)
        return np.where(waits, self.caught_up + budget, self.end)

    @property
    def runs_alike(self) -> bool:
        """Whether all stages run this chunk's rows, and nothing else."""
        return not self.is_pruned.any() and bool((self.caught_up == self.first).all())

    @property
    def choice(self) -> np.ndarray:
        """``kernels.selection.Choice``, ``[3 + 2 * stages, prefills]`` int32."""
        first, end = self.before[0], np.where(self.leads, self.end, self.num_prompt)
        numbers = np.vstack([self.begin, first, end, self.before, self.kept - self.before])
        return numbers.astype(np.int32)

    def window_part(self, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``kernels.queries.WindowPart`` in stage 0, of prompts that are pruned and of turns."""
        window_first = np.maximum(self.num_prompt - window, 0)
        count = np.maximum(self.end - np.maximum(self.first, window_first), 0)
        count *= self.sees_revived | (self.is_pruned & (self.ran[0] == 0))
        scored = self.first * (self.first > window_first) * self.is_pruned
        return count, self.num_prompt - self.end, scored


@dataclass(frozen=True)
class Span:
    """Rows of every prefill in a stage, by slot: ``first .. end - 1``; both ``[prefills]``."""

    first: np.ndarray
    end: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.end - self.first

    @property
    def num_keys(self) -> np.ndarray:
        """Keys that the rows attend to; 0 where there are none."""
        return self.end * (self.end > self.first)

    @property
    def num_rows(self) -> int:
        return int(self.lengths.sum())


@dataclass(frozen=True)
class RowPlan:
    """Attributes:
    spans: by stage, what runs beside the decodes.
    parts: by stage, what runs through it before, in order.
    catch_up: what runs through all stages but the first before anything else does.
    """

    spans: list[Span]
    parts: list[list[Span]]
    catch_up: list[Span]

    @classmethod
    def make(cls, prefills: Prefills, num_decodes: int, budget: int, window: int) -> "RowPlan":
        """Args:
        num_decodes: rows of the batch that are not prefills'.
        budget: most rows that run at once.
        window: last tokens of each prompt that score, and so run at once in every stage.
        """
        p, stages = prefills, len(prefills.kept)
        spans, parts = [Span(p.first, p.end)], [[]]
        room = budget - num_decodes - int((p.end - p.first)[~p.is_pruned].sum())
        later_end = p.later_end(budget)
        new = np.minimum(np.maximum(p.first, p.caught_up), later_end)
        completes = p.completes
        for stage in range(1, stages):
            kept = np.where(p.prunes, p.kept[stage], 0)
            ran, until = (np.minimum(x[stage], kept) for x in (p.ran, p.until))
            rows = until - ran
            at_least = np.minimum(rows, window if stage < stages - 1 else 1) * completes[stage]
            done = ran + _first(rows - at_least, int(rows.sum()) - room)
            parts.append(_cut(ran, done, budget))
            first = np.where(p.is_pruned, done, new + p.shift[stage])
            end = later_end + p.shift[stage] - p.sees_revived
            spans.append(Span(first, np.where(p.is_pruned, until, end)))
        is_behind = ~p.is_pruned & (p.caught_up < p.first)
        behind_end = np.minimum(p.first, later_end)
        catch_up = _cut(p.caught_up * is_behind, behind_end * is_behind, budget)
        return cls(spans, parts, catch_up)

    def padded(self, rows: list[int]) -> "RowPlan":
        """With as many rows in each stage, of which the last prefill has those that are missing."""
        spans = []
        for span, count in zip(self.spans, rows):
            end = span.end.copy()
            end[-1] += count - span.num_rows
            assert end[-1] >= span.first[-1]
            spans.append(Span(span.first, end))
        return replace(self, spans=spans)


def _first(lengths: np.ndarray, count: int) -> np.ndarray:
    """How many of each prefill's rows are among the first ``count`` of all."""
    before = np.cumsum(lengths) - lengths
    return _clip(count - before, lengths).astype(np.int32)


def _clip(at: np.ndarray, most: np.ndarray) -> np.ndarray:
    """To ``0 .. most``; ``np.clip`` takes ten times as long for a few numbers."""
    return np.minimum(np.maximum(at, 0), most)


def _cut(first: np.ndarray, end: np.ndarray, size: int) -> list[Span]:
    """The rows of all prefills, one after the other, in pieces of ``size``."""
    lengths = end - first
    before = np.cumsum(lengths) - lengths
    pieces = []
    for start in range(0, int(lengths.sum()), size):
        low, high = (_clip(at - before, lengths) for at in (start, start + size))
        pieces.append(Span((first + low).astype(np.int32), (first + high).astype(np.int32)))
    return pieces
