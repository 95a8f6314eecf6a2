"""``vllm serve`` as a process, and a client that takes times."""
