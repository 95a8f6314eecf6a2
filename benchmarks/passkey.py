"""Passkey retrieval: a number hidden somewhere in a long, dull text, asked for at the end."""

import random

_SUBJECTS = (
    "The ferry", "An old lighthouse", "The gardener", "A row of poplars", "The morning market",
    "The village baker", "A narrow footpath", "The wooden bridge", "A grey heron", "The clockmaker",
    "The evening train", "A small chapel", "The schoolhouse", "A stone wall", "The river",
)  # fmt: skip
_VERBS = (
    "waits near", "looks out over", "lies just beyond", "is often seen by", "leads slowly towards",
    "stands not far from", "rests beside", "returns each season to", "can be heard from",
)  # fmt: skip
_OBJECTS = (
    "the harbour", "the orchard", "the empty field", "the mill pond", "the edge of the forest",
    "the quiet square", "the hills in the north", "the low meadow", "the sandy shore",
)  # fmt: skip
_ENDINGS = (
    "while the weather stays mild", "as it has for many years", "when the fog begins to lift",
    "and nobody thinks much of it", "until the lamps are lit", "long after the rain has gone",
    "before the first visitors arrive", "and the day goes by without hurry",
)  # fmt: skip


def passkey_prompt(
    tokenizer, num_tokens: int, seed: int, depth: float = 0.5
) -> tuple[list[int], str]:
    """A chat prompt with a five-digit pass key in it.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        num_tokens: about how many tokens the prompt shall have; it comes out at most a sentence
            longer.
        seed: picks the key and the text around it.
        depth: where in the text the key is, 0 at the start to 1 at the end.

    Returns:
        The prompt's token ids and the key.
    """
    rng = random.Random(seed)
    key = str(rng.randint(10000, 99999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    filler: list[str] = []
    room = num_tokens - len(_chat(tokenizer, [needle]))
    while room > 0:
        filler.append(_sentence(rng))
        room -= len(tokenizer.encode(" " + filler[-1], add_special_tokens=False))
    filler.insert(round(depth * len(filler)), needle)
    return _chat(tokenizer, filler), key


def _sentence(rng: random.Random) -> str:
    subject, verb, place, ending = map(rng.choice, (_SUBJECTS, _VERBS, _OBJECTS, _ENDINGS))
    return f"{subject} {verb} {place}, {ending}."


def _chat(tokenizer, sentences: list[str]) -> list[int]:
    text = (
        "There is a pass key hidden in the text below. Find it and remember it.\n\n"
        f"{' '.join(sentences)}\n\nWhat is the pass key? Answer with the number only."
    )
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
