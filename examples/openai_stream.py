"""Ask about a long document with the OpenAI client, and print the answer as it comes:

openai_stream.py http://localhost:8000 MODEL FILE QUESTION [--set lazyllm=off ...]

``--set`` is a setting for this request alone; docs/configuration.md lists them.
"""

import argparse
import time

from openai import OpenAI


def setting(text: str) -> tuple[str, str | float]:
    name, value = text.split("=", 1)
    return name, float(value) if value[:1].isdigit() else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="its address, such as http://localhost:8000")
    parser.add_argument("model", help="as the server calls it")
    parser.add_argument("file", type=argparse.FileType())
    parser.add_argument("question")
    parser.add_argument("--set", type=setting, nargs="*", default=[], metavar="NAME=VALUE")
    parser.add_argument("--max-tokens", type=int, default=256, help="of the answer")
    args = parser.parse_args()

    client = OpenAI(base_url=f"{args.server}/v1", api_key="none")
    began = time.perf_counter()
    chunks = client.chat.completions.create(
        model=args.model,
        messages=[{"role": "user", "content": f"{args.file.read()}\n\n{args.question}"}],
        max_tokens=args.max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"vllm_xargs": dict(args.set)},
    )
    first = None
    for chunk in chunks:
        for choice in chunk.choices:
            if choice.delta.content:
                first = first or time.perf_counter() - began
                print(choice.delta.content, end="", flush=True)
        if chunk.usage:
            print(f"\n{chunk.usage.prompt_tokens} prompt tokens, first of the answer after", end="")
            print(f" {first:.2f} s" if first else " none: it is empty")


if __name__ == "__main__":
    main()
