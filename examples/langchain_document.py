"""Ask several questions about one long document with LangChain:

langchain_document.py http://localhost:8000 MODEL FILE QUESTION [QUESTION ...]

Needs ``pip install langchain-openai``. The document comes first in each prompt, so that from the
second question on its keys in the first stage come out of the prefix cache.
"""

import argparse

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("server", help="its address, such as http://localhost:8000")
    parser.add_argument("model", help="as the server calls it")
    parser.add_argument("file", type=argparse.FileType())
    parser.add_argument("questions", nargs="+")
    args = parser.parse_args()

    model = ChatOpenAI(
        base_url=f"{args.server}/v1",
        api_key="none",
        model=args.model,
        temperature=0,
        max_tokens=64,
        extra_body={"vllm_xargs": {"lazyllm_keep": 1.5}},  # keep half as much again
    )
    prompt = ChatPromptTemplate.from_template("{document}\n\n{question}")
    chain = prompt | model | StrOutputParser()
    document = args.file.read()
    for question in args.questions:
        print(question)
        for piece in chain.stream({"document": document, "question": question}):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
