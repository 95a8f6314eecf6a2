"""Mixed load on one ``vllm serve`` for a long time: nothing may be lost, leak or become slower."""
