"""Send a prompt to a running server and explain it."""

import json
import uuid
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from lazyllm_vllm.observe.explain.explanation import ExplainError, Explanation, explain
from lazyllm_vllm.observe.explain.prompt_file import Prompt
from lazyllm_vllm.observe.explain.token_texts import token_texts

START = (
    "LAZYLLM_TRACE=1 VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --lazyllm-config conservative "
    "--enforce-eager"
)


class Server:
    """An OpenAI-compatible server of vLLM.

    Args:
        url: its address, with or without ``/v1``.
        api_key: if it wants one.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Content-Type": "application/json"}
        if api_key:
            self.headers["Authorization"] = f"Bearer {api_key}"

    def explain(self, prompt: Prompt, max_tokens: int, tokenizer: str | None) -> Explanation:
        """The explanation of a prompt that this sends and has answered greedily.

        Args:
            tokenizer: folder or name of the model's; None: where the server has it from.

        Raises:
            ExplainError: the server was not started for it, or refused the prompt.
        """
        (model, *_) = self._ask("/v1/models")["data"]
        self._trace("none")  # before the work, whether there is a trace
        texts = _tokenizer(tokenizer or model["root"])
        body = {
            "model": model["id"],
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
            # Else the trace may lack what earlier requests computed.
            "cache_salt": uuid.uuid4().hex,
        }
        if prompt.messages is None:
            answer = self._ask("/v1/completions", body | {"prompt": prompt.text})
            choice = answer["choices"][0]
            asked = choice["prompt_token_ids"]
        else:
            answer = self._ask("/v1/chat/completions", body | {"messages": prompt.messages})
            choice = answer["choices"][0]
            asked = answer["prompt_token_ids"]
        self._check_tokenizer(texts, asked)
        tokens = token_texts(texts, asked + choice["token_ids"])
        return explain(
            model["id"],
            self._trace(answer["id"]),
            answer["id"],
            tokens[: len(asked)],
            tokens[len(asked) :],
        )

    def _trace(self, request: str) -> dict:
        body = {"method": "lazyllm_trace", "kwargs": {"request": request}}
        try:
            return self._ask("/collective_rpc", body)["results"][0]
        except ExplainError as error:
            raise ExplainError(
                f"{self.url} was not started with a trace to read; start it with: {START} ({error})"
            ) from None

    def _check_tokenizer(self, tokenizer, ids: list[int]) -> None:
        theirs = self._ask("/detokenize", {"tokens": ids})["prompt"]
        if tokenizer.decode(ids) != theirs:
            raise ExplainError("--tokenizer: it is another than the server's; name the server's")

    def _ask(self, path: str, body: dict | None = None) -> dict:
        data = None if body is None else json.dumps(body).encode()
        try:
            with urlopen(Request(self.url + path, data, self.headers)) as answer:
                return json.load(answer)
        except HTTPError as error:
            said = error.read().decode(errors="replace")[:500]
            raise ExplainError(f"{path}: {error.code} {error.reason}: {said}") from None
        except (URLError, ValueError, ConnectionError) as error:
            raise ExplainError(f"--url: no server answers at {self.url}: {error}") from None


def _tokenizer(name: str):
    from vllm.tokenizers import get_tokenizer

    try:
        return get_tokenizer(name)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ExplainError(f"--tokenizer: {name} cannot be read here ({first}); name one") from None
