"""``triton.jit`` for what runs in every step: nothing is compiled anew because a number changed."""

from vllm.triton_utils import triton

# Triton compiles a kernel once more for integers that are 1 or multiples of 16. These are another
# in every other step, and some request would wait for the compiler each time.
_CHANGING = (
    "always", "dst_base", "first_request", "first_row", "num_decodes", "num_rows",
    "num_splits", "revive_rows", "splits", "src_base", "stage",
)  # fmt: skip

step_jit = triton.jit(do_not_specialize=_CHANGING)
