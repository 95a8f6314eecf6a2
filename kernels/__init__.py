"""Triton kernels, each beside the plain PyTorch reference that is also the CPU path.

A public function of a kernel file looks at where its tensors live: on a GPU it launches the
kernel, on the CPU it runs the reference. The names ending in ``_triton`` and ``_reference`` are
for tests.

Words used throughout:

* *row*: a token being computed in this step; *batch index*: a request's place in this step.
* *slot*: a request's j-th key in a stage; *physical slot*: ``block * block_size + offset``, where
  the block table put it. Stage 0 keeps every token, so there slot j is position j, and what is
  known of a position (level, score, ...) is stored at its physical slot in stage 0.
"""
