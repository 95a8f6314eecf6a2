"""What the kernels of a boundary are given: tensors, with one place that says what each means."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Selection:
    """What every selection kernel of a step is given.

    Attributes:
        token_key: ``[physical slots]`` int32, rank of each prompt position, written.
        token_score: ``[physical slots]`` fp32.
        level: ``[physical slots]`` int8, number of stages in which the position has keys.
        selected: ``[physical slots]`` int8, last boundary at which this step selected it.
        position_table: ``[batch, width]`` int32, block table of stage 0.
        table: ``[requests, 1 + 3 * stages]`` int32, see ``lazyllm_vllm.request_table``.
        req_index: ``[batch]`` int32, row of ``table``; -1: no request.
        num_prompt, is_pruned: ``[batch]`` int32.
        active: ``[stages, batch]`` int32, whether the boundary before the stage chooses anew among
            the request's tokens in this step.
        limit: ``[stages, batch]`` int32, most tokens that the request may revive into the stage.
        histogram: ``[batch, 2 * 4096]`` int32, zeros between boundaries; see ``top_k``.
        found: ``[batch, 4]`` int32, threshold and ties of either list.
        counts: ``[batch, 3, splits]`` int32, of each split's positions: 0 those above the
            threshold, 1 those on list 0's. In prefill 2 counts the candidates. For decodes 0 and 2
            are of list 1, above and on the higher threshold.
        block_size: tokens a block of stage 0.
    """

    token_key: torch.Tensor
    token_score: torch.Tensor
    level: torch.Tensor
    selected: torch.Tensor
    position_table: torch.Tensor
    table: torch.Tensor
    req_index: torch.Tensor
    num_prompt: torch.Tensor
    is_pruned: torch.Tensor
    active: torch.Tensor
    limit: torch.Tensor
    histogram: torch.Tensor
    found: torch.Tensor
    counts: torch.Tensor
    block_size: int


@dataclass(frozen=True)
class Rows:
    """The rows of one stage: ``[decodes | revived | prefill tokens]``; or of all, every tensor with
    a leading dimension of stages.

    Attributes:
        position: ``[rows]`` int64.
        request: ``[rows]`` int32, batch index; -1: an unused row.
        slot: ``[rows]`` int32, slot in the stage.
        key_len: ``[batch]`` int32, keys of each request in the stage.
        num_revived: ``[batch]`` int32.
    """

    position: torch.Tensor
    request: torch.Tensor
    slot: torch.Tensor
    key_len: torch.Tensor
    num_revived: torch.Tensor

    def of_stage(self, stage: int) -> "Rows":
        return Rows(*(getattr(self, name)[stage] for name in self.__dataclass_fields__))


@dataclass(frozen=True)
class PrefillMove:
    """How prefill rows go from the stage before a boundary to the stage after it.

    Attributes:
        start, dst_start: ``[prefills + 1]`` int32, first row of each request before and after,
            counted from ``base`` and ``dst_base``.
        position: ``[rows before]`` int64.
        dst_row: ``[rows before]`` int32, written: the row after, -1 if dropped.
        request: ``[rows before]`` int32, written: batch index.
    """

    start: torch.Tensor
    dst_start: torch.Tensor
    base: int
    dst_base: int
    position: torch.Tensor
    dst_row: torch.Tensor
    request: torch.Tensor
