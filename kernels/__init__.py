"""Triton kernels, each beside the plain PyTorch reference that is also the CPU path.

A public function looks at where its tensors live: on a GPU it launches the kernel, on the CPU it
runs the reference. Names ending in ``_triton`` and ``_reference`` are for tests.

Words used throughout:

* *row*: a token being computed in this step; *batch index*: a request's place in this step.
* *slot*: a request's j-th key in a stage; *physical slot*: where its block table put it, see
  ``paged``. Stage 0 keeps every token, so there slot j holds position j.
* *rank*: what a prompt token is chosen by, a number that orders as its pooled score does.
* *prompt state*: what is known of each position of a pruned prompt, see ``prompt_pages``.
"""
