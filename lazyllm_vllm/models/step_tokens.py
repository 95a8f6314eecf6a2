"""The tokens of a step's rows, where the pieces of CUDA graphs look for them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lazyllm_vllm.runtime.step import Step


@contextmanager
def step_tokens(
    step: Step, input_ids: torch.Tensor, positions: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The tokens and positions of a step's rows in stage 0, ``[rows]`` each. Pieces read tokens
    where vLLM puts them: those of a step with turns, whose rows have another order, are there
    meanwhile.

    Args:
        input_ids, positions: vLLM's, ``[rows or more]``.
    """
    rows, turns = step.num_rows(0), step.batch.turns
    if turns is None:
        yield input_ids[:rows], positions[:rows]
        return
    place = _of_length(input_ids, rows)
    given, ordered = place.clone(), input_ids[turns.rows]
    place.copy_(ordered)
    yield place, step.batch.positions
    place.copy_(given)


def _of_length(input_ids: torch.Tensor, rows: int) -> torch.Tensor:
    """So many of the tokens in vLLM's buffer, of which ``input_ids`` may be fewer; past its end a
    buffer of its own, which no piece reads."""
    end = input_ids.storage_offset() + rows
    if end * input_ids.itemsize <= input_ids.untyped_storage().nbytes():
        return input_ids.as_strided((rows,), (1,))
    return input_ids.new_empty(rows)
