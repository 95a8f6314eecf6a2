"""What an explanation tells, from traces made by hand, and how the page holds any text."""

import json
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest
from transformers import AutoTokenizer

from lazyllm_vllm.cli.main import main
from lazyllm_vllm.observe.explain.explanation import ExplainError, Explanation, explain
from lazyllm_vllm.observe.explain.prompt_file import Prompt, read_prompt
from lazyllm_vllm.observe.explain.render import render
from lazyllm_vllm.observe.explain.server import START, Server
from lazyllm_vllm.observe.explain.token_texts import Token, token_texts

# Six tokens, stages of 2, 3 and 5 layers. Of the answer's three tokens two were run; the first
# called 1 back into stage 1, the second 1 into stage 2 and 4 into stage 1.
TRACE = {
    "starts": [0, 2, 5, 10],
    "prefills": {"7-abc": [{"num_prompt": 6, "chunks": [(0, 6)], 1: [0, 2, 5], 2: [2, 5]}]},
    "places": {"7-abc": {1: [3, 4, 2, 6, 5, 1], 2: [3, 0, 2, 0, 0, 1]}},
    "decodes": {
        "7-abc": [
            {
                1: {"selected": [1, 2, 5], "revived": [1]},
                2: {"selected": [2, 5], "revived": []},
            },
            {
                1: {"selected": [1, 4, 5], "revived": [4]},
                2: {"selected": [1, 5], "revived": [1]},
            },
        ]
    },
}


def _tokens(*texts: str) -> list[Token]:
    return [Token(id=i, text=text, piece=text) for i, text in enumerate(texts)]


PROMPT, ANSWER = _tokens("a", "b", "c", "d", "e", "f"), _tokens("x", "y", "z")


def _explain(trace: dict = TRACE, request: str = "7", prompt=PROMPT, answer=ANSWER):
    return explain("a model", trace, request, prompt, answer)


def test_what_became_of_each_token():
    told = _explain()
    assert told.layers == [(1, 2), (3, 5), (6, 10)]
    assert told.kept == [[0, 1, 2, 3, 4, 5], [0, 2, 5], [2, 5]]
    assert told.depths() == [2, 1, 3, 1, 1, 3]
    assert [step.revived for step in told.steps] == [[[], [1], []], [[], [4], [1]]]
    assert told.steps[1].selected == [[], [1, 4, 5], [1, 5]]
    # Kept 6, 3, 2 and revived 0, 2, 1, in 2, 3, 5 layers of 10.
    assert told.share_computed == pytest.approx((6 * 2 + 5 * 3 + 3 * 5) / (6 * 10))
    assert Explanation.model_validate_json(told.model_dump_json()) == told


def test_a_server_says_the_same_in_json():
    assert _explain(json.loads(json.dumps(TRACE))) == _explain()


def test_steps_that_no_answer_came_of_are_left_out():
    """The engine may run one more before it knows that the answer is over."""
    assert len(_explain(answer=ANSWER[:2]).steps) == 1
    assert _explain(answer=ANSWER[:1]).steps == []


def test_a_prompt_that_was_not_pruned():
    whole = [{"num_prompt": 2, "chunks": [(0, 2)], 1: [0, 1], 2: [0, 1]}]
    trace = {"starts": [0, 2, 5, 10], "prefills": {"7": whole}, "places": {}, "decodes": {}}
    told = _explain(trace, prompt=PROMPT[:2], answer=ANSWER[:1])
    assert told.depths() == [3, 3] and told.share_computed == 1


def test_what_cannot_be_told_is_said():
    (prefill,) = TRACE["prefills"]["7-abc"]
    twice = TRACE | {"prefills": {"7-abc": [prefill, prefill]}}
    with pytest.raises(ExplainError, match="preempted"):
        _explain(twice)
    with pytest.raises(ExplainError, match="has 0 requests of the id 70"):
        _explain(request="70")
    with pytest.raises(ExplainError, match="6 prompt tokens, not of 5"):
        _explain(prompt=PROMPT[:5])
    with pytest.raises(ExplainError, match="prefix cache"):
        _explain(TRACE | {"places": {}})


def test_texts_of_tokens_are_the_text(smollm2):
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    text = "<|im_start|>user\n</script> &amp; 🦥 日本\tcafé"
    ids = tokenizer.encode(text)
    tokens = token_texts(tokenizer, ids)
    assert "".join(token.text for token in tokens) == text == tokenizer.decode(ids)
    assert [token.id for token in tokens] == ids and all(token.piece for token in tokens)
    assert tokens[0].text == tokens[0].piece == "<|im_start|>"
    (at,) = (i for i, token in enumerate(tokens) if "🦥" in token.text)
    assert tokens[at - 1].text == "", "the bytes before have no text of their own"


class _Scripts(HTMLParser):
    """What scripts of a page hold, and how many tags of other kinds there are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.scripts, self.tags = [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script" and self.scripts:
            self.scripts[-1] += data


def test_the_page_holds_any_text():
    odd = ["</script><img src=x>", "<!--", "{{style}}", "\u2028\\n", "🦥", '"']
    told, plain = _explain(prompt=_tokens(*odd), answer=_tokens(*odd[:3])), _explain()
    page, usual = _Scripts(render(told)), _Scripts(render(plain))
    assert page.tags == usual.tags, "the prompt made tags"
    data = json.loads(page.scripts[0])
    assert [text for _, text, _ in data["prompt"]] == odd
    assert data["depth"] == told.depths() and data["places"] == told.places
    assert "http" not in render(plain).replace("http-equiv", ""), "the page asks no network"


def test_a_prompt_file(tmp_path):
    file = tmp_path / "prompt"
    with pytest.raises(ExplainError, match="--prompt-file: .*No such file"):
        read_prompt(file, chat=False)
    file.write_bytes(b"")
    with pytest.raises(ExplainError, match="is empty"):
        read_prompt(file, chat=False)
    file.write_bytes(b"\xff")
    with pytest.raises(ExplainError, match="not UTF-8"):
        read_prompt(file, chat=False)
    file.write_bytes(b"a\r\nb\n")
    assert read_prompt(file, chat=False) == Prompt("a\r\nb\n")
    assert read_prompt(file, chat=True).messages == [{"role": "user", "content": "a\r\nb\n"}]
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    file.write_text(json.dumps(messages))
    assert read_prompt(file, chat=True).messages == messages
    assert read_prompt(file, chat=False).messages is None
    file.write_text('[{"no": "messages"}]')
    assert read_prompt(file, chat=True).messages == [
        {"role": "user", "content": '[{"no": "messages"}]'}
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a model to run, or --url"),
        (["m", "--url", "http://x"], "one of the two"),
        (["m", "--tokenizer", "t"], "--tokenizer is for use with --url"),
        (["--url", "http://x", "--max-model-len", "9"], "--max-model-len is for use with a model"),
        (["m", "--json", "/no/such/folder/f"], "--json: there is no folder"),
        (["m", "--out", "."], "--out: . is a folder"),
        (["m", "--lazyllm-config", "fast"], "neither JSON, a file, nor a preset"),
        (["m", "--llm", '{"enforce_eager": false}'], "--llm: enforce_eager"),
    ],
)
def test_flags_that_do_not_work_are_said_at_once(arguments, said, tmp_path, capsys):
    file = tmp_path / "prompt"
    file.write_text("hello")
    assert main(["explain", "--prompt-file", str(file), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("lazyllm explain: ") and said in error


def test_a_server_that_was_not_started_for_it_is_said():
    class Untraced(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"data": [{"id": "m", "root": "m"}]}')

        def do_POST(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Untraced)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    with pytest.raises(ExplainError) as said:
        Server(address + "/v1").explain(Prompt("hello"), 1, None)
    server.shutdown()
    server.server_close()
    assert START in str(said.value) and "/collective_rpc: 404" in str(said.value)
    with pytest.raises(ExplainError, match="--url: no server answers at"):
        Server(address).explain(Prompt("hello"), 1, None)
