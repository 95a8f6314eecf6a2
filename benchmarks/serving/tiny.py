"""A Llama for a trial on a CPU."""

from benchmarks.speed.shapes import SHAPES

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
SHAPE = SHAPES["Llama-3.1-8B"] | SIZES | {"torch_dtype": "float32"}
FLAGS = ["--dtype", "float32", "--enforce-eager", "--block-size", "32"]  # of ``vllm serve``
CONFIG = {"min_prompt_tokens": 64}  # LazyLLM's, beside what is tried
