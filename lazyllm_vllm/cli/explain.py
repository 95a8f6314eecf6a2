"""Show what became of each token of a prompt: kept, dropped, revived.

Writes a page to read in a browser, and if asked the same as JSON (docs/explain.md).
"""

import argparse
import json
import sys
from pathlib import Path

from lazyllm_vllm.cli.whole_file import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="what LLM() takes; not with --url")
    parser.add_argument("--url", help="of a running server, instead of a model")
    parser.add_argument("--prompt-file", type=Path, required=True, help="the prompt, UTF-8")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="put the prompt into the model's chat template; it may be a JSON list of messages",
    )
    parser.add_argument("--out", type=Path, default="explain.html", help="page to write")
    parser.add_argument("--json", type=Path, help="file to write the same to as JSON")
    parser.add_argument("--max-tokens", type=_positive, default=64, help="of the answer (64)")
    own = parser.add_argument_group("with a model")
    own.add_argument("--lazyllm-config", help="as for vllm serve; left out: the default preset")
    own.add_argument("--max-model-len", type=int, help="as for vllm serve")
    own.add_argument("--llm", type=_fields, metavar="JSON", help="other arguments of LLM()")
    server = parser.add_argument_group("with --url")
    server.add_argument("--tokenizer", help="the model's, if it is not where the server has it")
    server.add_argument("--api-key", help="if the server wants one")


def main(args: argparse.Namespace) -> int:
    from lazyllm_vllm.observe.explain.explanation import ExplainError
    from lazyllm_vllm.plan.config import ConfigError

    try:
        _check(args)
        explanation = _explain(args)
    except (ExplainError, ConfigError) as error:
        print(f"lazyllm explain: {error}", file=sys.stderr)
        return 1
    from lazyllm_vllm.observe.explain.render import render

    files = [("the page", args.out, render(explanation))]
    if args.json:
        files.append(("the same as JSON", args.json, explanation.model_dump_json()))
    for name, path, text in files:
        try:
            write_whole(path, text)
        except OSError as error:
            print(f"lazyllm explain: {path} is not written: {error.strerror}", file=sys.stderr)
            return 1
        print(f"{name}: {path}")
    return 0


def _check(args: argparse.Namespace) -> None:
    """Before an engine takes its time. Raises ExplainError."""
    from lazyllm_vllm.observe.explain.explanation import ExplainError

    if (args.model is None) == (args.url is None):
        raise ExplainError("give a model to run, or --url of a running server: one of the two")
    if args.url is None:
        unused, where = ("tokenizer", "api_key"), "--url"
    else:
        unused, where = ("lazyllm_config", "max_model_len", "llm"), "a model"
    for name in unused:
        if getattr(args, name) is not None:
            raise ExplainError(f"--{name.replace('_', '-')} is for use with {where}; leave it out")
    for name in ("model", "enforce_eager", "additional_config"):
        if name in (args.llm or {}):
            raise ExplainError(f"--llm: {name} is set by this command; leave it out")
    for name in ("out", "json"):
        path = getattr(args, name)
        if path is not None and not path.absolute().parent.is_dir():
            raise ExplainError(f"--{name}: there is no folder {path.parent}")
        if path is not None and path.is_dir():
            raise ExplainError(f"--{name}: {path} is a folder; name a file")


def _explain(args: argparse.Namespace):
    from lazyllm_vllm.observe.explain.prompt_file import read_prompt
    from lazyllm_vllm.plan.config import parse_config
    from lazyllm_vllm.plan.presets import DEFAULT

    prompt = read_prompt(args.prompt_file, args.chat)
    if args.url is not None:
        from lazyllm_vllm.observe.explain.server import Server

        return Server(args.url, args.api_key).explain(prompt, args.max_tokens, args.tokenizer)
    from lazyllm_vllm.observe.explain.local import explain_locally, start_traced

    config = parse_config(args.lazyllm_config or DEFAULT).model_dump(exclude_unset=True)
    options = {"max_model_len": args.max_model_len} | (args.llm or {})
    llm = start_traced(args.model, config, **options)
    return explain_locally(llm, args.model, prompt, args.max_tokens)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _fields(text: str) -> dict:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError('must be an object, such as \'{"dtype": "float16"}\'')
    return fields
