"""A stage's rows through CUDA graph pieces that were captured of a whole model.

A layer's pieces do the same to a row whoever's it is. So what was captured of a model at n rows,
cut at its boundaries, runs any stage of a step that has at most n rows there; attention and
boundaries stay between the pieces. Without them a pruned prefill of some thousand tokens waits for
the CPU, which starts the kernels of its later stages one by one.
"""

import bisect
import weakref
from dataclasses import dataclass, field

import torch

from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphCapture
from vllm.utils.torch_utils import weak_ref_tensor


@dataclass
class _Captured:
    """One capture of the model.

    Attributes:
        capture: vLLM's, which it drops when it captures anew.
        input_ids: what the embedding reads.
        starts: by stage, its first segment.
        states: by stage, what its first layer reads; of the first nothing.
        output: what the model returned.
    """

    capture: weakref.ref
    input_ids: torch.Tensor
    starts: list[int] = field(default_factory=list)
    states: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    output: torch.Tensor | None = None


class StagePieces:
    """What was captured, by number of rows. While one is captured: ``begin``, ``mark`` where each
    stage begins, ``end``. Then ``covers`` and ``run``."""

    def __init__(self) -> None:
        self._captured: dict[int, _Captured] = {}
        self._sizes: list[int] = []
        self._now: _Captured | None = None

    def begin(self, input_ids: torch.Tensor) -> None:
        """A capture has begun, of a batch of these tokens."""
        capture = weakref.ref(BreakableCUDAGraphCapture.current())
        self._now = _Captured(capture, weak_ref_tensor(input_ids))

    def mark(self, *states: torch.Tensor) -> None:
        """The next stage begins, with what its first layer is given."""
        self._now.starts.append(len(self._now.capture().segments))
        self._now.states.append(tuple(weak_ref_tensor(each) for each in states))

    def end(self, output: torch.Tensor) -> None:
        """The model's forward has returned ``output``."""
        self._now.output = weak_ref_tensor(output)
        self._captured[len(output)] = self._now
        self._sizes = sorted(self._captured)
        self._now = None

    def covers(self, num_rows: int, input_ids: torch.Tensor) -> bool:
        """Whether there are pieces for so many rows, which read these tokens."""
        captured = self._of(num_rows)
        return (
            captured is not None
            and captured.capture() is not None
            and captured.input_ids.data_ptr() == input_ids.data_ptr()
        )

    def run(self, stage: int, num_rows: int, states: tuple) -> tuple[torch.Tensor, ...]:
        """Run a stage's layers.

        Args:
            states: ``[num_rows, hidden]`` each, what the first layer is given; None: zeros. Not
                read in the first stage, which embeds its tokens.

        Returns:
            What the next stage's first layer is given; behind the last stage, the model's output.
            It lies in the graphs' memory, and is to be used before other pieces run.
        """
        captured = self._of(num_rows)
        for mine, given in zip(captured.states[stage], states if stage else ()):
            mine = mine[:num_rows]
            mine.zero_() if given is None else mine.copy_(given)
        is_last = stage + 1 == len(captured.starts)
        # What ends a stage is the boundary, which is not run here.
        end = None if is_last else captured.starts[stage + 1] - 1
        for segment in captured.capture().segments[captured.starts[stage] : end]:
            segment()
        after = (captured.output,) if is_last else captured.states[stage + 1]
        return tuple(each[:num_rows] for each in after)

    def _of(self, num_rows: int) -> _Captured | None:
        at = bisect.bisect_left(self._sizes, num_rows)
        return self._captured[self._sizes[at]] if at < len(self._sizes) else None
