"""Triton on a machine without a GPU, for development and CI."""

import os


class _InterpretedDriver:
    @staticmethod
    def is_active() -> bool:
        return True

    @staticmethod
    def get_current_target():
        """Inductor asks, and takes this error for an answer: that Triton compiles nothing here."""
        raise RuntimeError("Triton's interpreter has no target to compile for")


class _InterpretedBackend:
    driver = _InterpretedDriver


def interpret_triton_on_cpu() -> None:
    """Let vLLM's CPU build use Triton through its interpreter when ``TRITON_INTERPRET=1``.

    vLLM looks for a Triton backend named ``cpu`` when ``vllm.triton_utils`` is first imported, and
    without one turns Triton, and Model Runner V2 with it, off. The interpreter needs no backend,
    so a stand-in is enough. A platform plugin is the one hook that runs before that import, in
    every process; returning None says that it offers no platform.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return None
    from triton.backends import backends

    backends.setdefault("cpu", _InterpretedBackend)
    return None
