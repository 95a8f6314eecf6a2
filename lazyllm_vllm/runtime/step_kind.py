"""What a step is for."""

from enum import Enum, auto


class StepKind(Enum):
    RUN = auto()  # requests, run now or in graph pieces
    REPLAY = auto()  # requests that replay a full CUDA graph: it has a plan already
    CAPTURE = auto()  # recorded in a full CUDA graph
    CAPTURE_SELECTING = auto()  # the same, with selection and revival
    CAPTURE_TURN = auto()  # the same, of a turn
    DUMMY = auto()  # recorded in graph pieces, or made up by vLLM
    WARM_UP = auto()  # made up to run all that there is once

    @property
    def has_requests(self) -> bool:
        return self in (StepKind.RUN, StepKind.REPLAY)

    @property
    def is_in_full_graph(self) -> bool:
        return self in (StepKind.REPLAY, StepKind.CAPTURE, StepKind.CAPTURE_SELECTING)

    @property
    def is_recorded(self) -> bool:
        """Whether a CUDA graph records the step, or is readied for it."""
        captures = StepKind.CAPTURE, StepKind.CAPTURE_SELECTING, StepKind.CAPTURE_TURN
        return self in (*captures, StepKind.DUMMY)
