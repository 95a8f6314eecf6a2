"""Passkey retrieval: a number hidden somewhere in a long, dull text, asked for at the end."""

import random

# Plain on purpose: what a 135M model's attention in its tenth layer can tell from a pass key. In
# more eventful prose it still finds the key, but that layer alone no longer ranks it high.
_NOUNS = ("river", "road", "hill", "bread", "cat", "wind", "field", "tea", "boat", "path", "bell")
_ADJECTIVES = ("slow", "long", "low", "warm", "old", "mild", "wide", "quiet", "dry", "calm", "grey")


def passkey_prompt(
    tokenizer, num_tokens: int, seed: int, depth: float = 0.5
) -> tuple[list[int], str]:
    """A prompt with a five-digit pass key in it.

    Args:
        tokenizer: a Hugging Face tokenizer. Without a chat template the model is taken for one that
            continues texts, and the prompt ends where the key comes next.
        num_tokens: about how many tokens the prompt shall have; it comes out at most a sentence
            longer.
        seed: picks the key and the text around it.
        depth: where in the text the key is, 0 at the start to 1 at the end.

    Returns:
        The prompt's token ids and the key.
    """
    rng = random.Random(seed)
    key = str(rng.randint(10000, 99999))
    needle = f"\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
    filler: list[str] = []
    room = num_tokens - len(_prompt(tokenizer, [needle]))
    while room > 0:
        filler.append(_sentence(rng))
        room -= len(tokenizer.encode(" " + filler[-1], add_special_tokens=False))
    filler.insert(round(depth * len(filler)), needle)
    return _prompt(tokenizer, filler), key


def _sentence(rng: random.Random) -> str:
    return f"The {rng.choice(_NOUNS)} is {rng.choice(_ADJECTIVES)}."


def _prompt(tokenizer, sentences: list[str]) -> list[int]:
    text = (
        "There is a pass key hidden in the text below. Find it and remember it.\n\n"
        f"{' '.join(sentences)}\n\nWhat is the pass key?"
    )
    if tokenizer.chat_template is None:
        whole = f"{tokenizer.bos_token}{text} The pass key is"
        return tokenizer.encode(whole, add_special_tokens=False)
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{text} Answer with the number only."}],
        add_generation_prompt=True,
        return_dict=False,
    )
