"""Kernels of vLLM's that run in NumPy on a CPU, where Triton's interpreter would take most of an
engine's time."""

import inspect
from collections.abc import Callable


class InNumpy:
    """Is launched as the kernel that it stands for, ``kernel[grid](...)``.

    Args:
        kernel: vLLM's.
        function: called with the grid and the kernel's arguments by name.
    """

    def __init__(self, kernel, function: Callable) -> None:
        self.function = function
        self.names = list(inspect.signature(kernel.fn).parameters)

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args, **kwargs) -> None:
            self.function(grid, **dict(zip(self.names, args)), **kwargs)

        return launch


def replace(module, kernels: dict[str, Callable]) -> None:
    """From now on, in this process and those forked from it: functions for the module's kernels."""
    for name, function in kernels.items():
        setattr(module, name, InNumpy(getattr(module, name), function))
