"""``triton.jit`` for what runs in every step: nothing is compiled anew because a number changed."""

from vllm.triton_utils import triton

# Triton compiles a kernel once more for integers that are 1 or multiples of 16. These change from
# step to step, and some request would wait for the compiler each time.
_CHANGING = (
    "after_base",
    "before_base",
    "first_head",
    "first_request",
    "first_row",
    "marks_always",
    "num_decodes",
    "num_pairs",
    "num_rows",
    "num_splits",
    "num_turns",
    "prefill_base",
    "revive_rows",
    "splits",
    "stage",
    "turn_quota",
)

# And for addresses that are multiples of 16: these are of rows in a table whose width changes.
_ANYWHERE = (
    "after_first_ptr",
    "after_shift_ptr",
    "after_start_ptr",
    "before_first_ptr",
    "before_shift_ptr",
    "before_start_ptr",
    "starts_ptr",
)

step_jit = triton.jit(do_not_specialize=_CHANGING, do_not_specialize_on_alignment=_ANYWHERE)
