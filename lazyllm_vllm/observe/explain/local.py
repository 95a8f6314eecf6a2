"""Run a prompt in an engine of one's own and explain it."""

import os

from lazyllm_vllm.observe.explain.explanation import ExplainError, Explanation, explain
from lazyllm_vllm.observe.explain.prompt_file import Prompt
from lazyllm_vllm.observe.explain.token_texts import token_texts


def start_traced(model: str, lazyllm: dict, **options):
    """A ``vllm.LLM`` that records what every boundary decides.

    Args:
        lazyllm: the plugin's configuration.
        options: of ``LLM``.
    """
    os.environ["LAZYLLM_TRACE"] = "1"  # also for processes that the engine starts
    from vllm import LLM

    return LLM(model, **options, enforce_eager=True, additional_config={"lazyllm": lazyllm})


def explain_locally(llm, model: str, prompt: Prompt, max_tokens: int) -> Explanation:
    """Answer greedily, with one request.

    Raises:
        ExplainError: the engine refused the prompt, or there is nothing to tell.
    """
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens)
    ask = llm.generate if prompt.messages is None else llm.chat
    try:
        (output,) = ask(prompt.messages or prompt.text, sampling, use_tqdm=False)
    except ValueError as error:
        raise ExplainError(str(error)) from None
    return explain_output(llm, model, output)


def explain_output(llm, model: str, output) -> Explanation:
    """The explanation of a ``RequestOutput`` of a traced engine."""
    asked, said = list(output.prompt_token_ids), list(output.outputs[0].token_ids)
    tokens = token_texts(llm.get_tokenizer(), asked + said)
    trace = llm.collective_rpc("lazyllm_trace", args=(output.request_id,))[0]
    return explain(model, trace, output.request_id, tokens[: len(asked)], tokens[len(asked) :])
