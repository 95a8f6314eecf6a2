"""How vLLM cuts the layers of stages into KV cache groups, all of one size."""

from collections.abc import Sequence

_ALIGNED = 16  # a part of a hidden state is a multiple of so many numbers


def part_width(hidden_size: int, ranks: int) -> int:
    """Numbers of a hidden state that each rank of tensor parallelism parks: all, where it does not
    divide well."""
    return hidden_size if hidden_size % (ranks * _ALIGNED) else hidden_size // ranks


def parked_pages(hidden_size: int, num_kv_heads: int, head_size: int) -> int:
    """Pages of a block that hold the hidden states of its tokens (``hidden_size``
    numbers each), whatever the block size: hidden
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
