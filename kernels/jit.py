"""``triton.jit`` for what runs in every step: nothing is compiled anew because a number changed."""

from vllm.triton_utils import triton

# Triton compiles a kernel once more for integers that are 1 or multiples of 16. These change from
# step to step, and some request would wait for the compiler each time.
_CHANGING = (
    "after_base",
    "before_base",
    "first_request",
    "first_row",
    "marks_always",
    "num_decodes",
    "num_rows",
    "num_splits",
    "prefill_base",
    "revive_rows",
    "splits",
    "stage",
)

step_jit = triton.jit(do_not_specialize=_CHANGING)
