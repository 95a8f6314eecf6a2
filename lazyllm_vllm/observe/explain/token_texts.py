"""The text that each token of a prompt stands for."""

from pydantic import BaseModel


class Token(BaseModel):
    """Attributes:
    id: in the vocabulary.
    text: what it adds to the text. Empty where a character is spread over tokens: the one that
        completes it has it.
    piece: its entry in the vocabulary.
    """

    id: int
    text: str
    piece: str


def token_texts(tokenizer, ids: list[int]) -> list[Token]:
    """Of tokens in order: their ``text``s together are the text of all.

    Args:
        tokenizer: one of vLLM's or Hugging Face's.
    """
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    tokens, pieces, prefix, read = [], None, 0, 0
    for token_id in ids:
        # With the pieces so far it needs no earlier ids.
        new, text, prefix, read = detokenize_incrementally(
            tokenizer, [token_id], pieces, prefix, read
        )
        pieces = pieces or []
        pieces += new
        tokens.append(Token(id=token_id, text=text, piece=pieces[-1]))
    return tokens
