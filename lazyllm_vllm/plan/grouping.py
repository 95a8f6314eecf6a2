"""How vLLM cuts the layers of stages into KV cache groups, all of one size."""

from collections.abc import Sequence


def parked_pages(hidden_size: int, num_kv_heads: int, head_size: int) -> int:
    """Pages of a block that hold the hidden states of its tokens, whatever the block size: hidden
    states are stored like keys and values, of which a page has one layer's."""
    return -(-hidden_size // (2 * num_kv_heads * head_size))


def layers_per_group(stages: Sequence[int]) -> int:
    """Layers in each KV cache group, as vLLM's ``_get_kv_cache_groups_uniform_page_size`` has it.

    Args:
        stages: how many layers each has.

    Returns:
        The shortest stage's number, or the longest's when they are nearly equal. A stage's last
        group may have fewer layers, and leaves the rest of its blocks unused.
    """
    return max(stages) if max(stages) < min(stages) * 1.5 else min(stages)
