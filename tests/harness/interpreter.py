"""Triton's interpreter, two to three times quicker: what it works out anew at every launch, load or
sum is worked out once, or not at all where nobody looks at it. What kernels compute is the same."""

import math
from dataclasses import replace
from functools import cache

import triton.language as tl
from triton.runtime import interpreter


class _Stays:
    """What a launch puts into ``triton.language`` is there for the next."""

    def restore(self) -> None:
        pass


def speed_up() -> None:
    """From now on, in this process and those forked from it."""
    patch, dtype_of, patched = interpreter._patch_lang, interpreter._get_np_dtype, set()
    dtype_of_scalar = cache(dtype_of)

    def patch_once(fn) -> _Stays:
        modules = frozenset(id(v) for v in fn.__globals__.values() if v is tl or v is tl.core)
        if modules not in patched:
            patch(fn)
            patched.add(modules)
        return _Stays()

    def cached_dtype_of(tt_dtype):
        scalar = tt_dtype.scalar
        is_pointer = isinstance(scalar, tl.pointer_type)  # such a type has no hash
        return dtype_of(scalar) if is_pointer else dtype_of_scalar(scalar)

    interpreter._patch_lang, interpreter._get_np_dtype = patch_once, cached_dtype_of
    tl.tensor.__init__ = _init_tensor
    # It computes whether integers overflow, and tells nobody unless ``debug`` is set too.
    builder = interpreter.interpreter_builder
    assert not builder.options.debug
    builder.options = replace(builder.options, sanitize_overflow=False)


def _init_tensor(self, handle, type) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.numel, self.shape = _sizes(type.shape if type.is_block() else ())


@cache
def _sizes(shape: tuple[int, ...]) -> tuple[tl.constexpr, tl.tuple]:
    return tl.constexpr(math.prod(shape)), tl.tuple([tl.constexpr(n) for n in shape])
