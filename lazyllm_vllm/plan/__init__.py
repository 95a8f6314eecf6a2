"""What is decided before a step runs: configuration, stages, and what a prompt's length implies.

Nothing here imports torch or vLLM, so that the scheduler's process and the worker's agree without
a message between them.
"""
