"""The model that is fuzzed: tiny, with random weights and a tokenizer of one word a token."""

from pathlib import Path

import torch
from harness import families
from harness.tiny import SIZES
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LONGEST, SEATS, BLOCK = 320, 14, 16
MOST_TOKENS = 24  # of an answer
END = 2  # the token that ends a text
# Blocks of the KV cache, as multiples of what the neediest request takes, which is 140 at most.
ROOMS = (1, 1.25, 1.75, 4)
# Answers that a grammar allows, of tokens that begin no other way.
CHOICES = ((5, 7, 9, END), (6, 8, END))
GRAMMAR = {"choice": ["".join(f"w{token}" for token in one[:-1]) for one in CHOICES]}
ON_GPU = torch.version.cuda is not None
OPTIONS = {
    "block_size": BLOCK,
    "max_model_len": LONGEST,
    "max_num_seqs": SEATS,
    "max_num_batched_tokens": LONGEST,
    "scheduling_policy": "priority",
    "num_gpu_blocks_override": 640,
}
if ON_GPU:
    OPTIONS |= {"dtype": "bfloat16", "enforce_eager": False, "gpu_memory_utilization": 0.1}
    OPTIONS |= {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}
CONFIG = {
    "prune": [{"layer": 1, "keep": 0.6}, {"layer": 2, "keep": 0.3}, {"layer": 4, "keep": 0.2}],
    "schedules": {"mild": [{"layer": 2, "keep": 0.7}]},
    "min_prompt_tokens": 60,
    "score_pool": 3,
    "revive_min_score": 0,
}
# How many tokens a request may revive must not depend on who decodes beside it, or its answer does.
ENGINES = {
    "reviving": {"revive_budget": 4 * SEATS, "revive_per_request": 4},
    "resident": {"revive_budget": 0},
    "strict": {"revive_budget": 0, "decode": "strict"},
    "mass": {"revive_budget": 4 * SEATS, "revive_per_request": 4, "keep_mass": 0.8},
    "deep": {"revive_budget": 4 * SEATS, "revive_per_request": 4, "reuse": "deep"},
    "on_request": {"prune": [], "revive_budget": 4 * SEATS, "revive_per_request": 4},
}


def save(folder: Path) -> Path:
    """Write the checkpoint, the same each time. Token i reads ``wi``."""
    folder.mkdir()
    families.save_tiny("llama", folder)
    vocabulary = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = f"w{END}"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(folder)
    return folder
