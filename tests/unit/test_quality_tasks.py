"""The tasks of RULER and those beside them: their lengths, their answers worked out anew from the
prompt's text, and what RULER says of each."""

import math
import random
import re
from collections import Counter

import pytest
from transformers import AutoTokenizer

from benchmarks.quality.metrics import METRICS
from benchmarks.quality.sample import Writer
from benchmarks.quality.tasks import TASKS, haystack, words

NIAH = [f"niah single {i}" for i in (1, 2, 3)] + [f"niah multikey {i}" for i in (1, 2, 3)]
NIAH += ["niah multivalue", "niah multiquery"]
RULER = [*NIAH, "variable tracking", "common words", "frequent words", "qa 1", "qa 2"]
QUESTIONS = ("qa 1", "qa 2", "two questions", "question first, documents")
MANY_SHOT = [f"many-shot, {labels} labels" for labels in (10, 50, 200)]
OTHERS = [
    *QUESTIONS[2:],
    "key-value retrieval",
    *MANY_SHOT,
    "question first, needle",
    "instruction at the start",
    "instruction in the middle",
    "code words",
    "conversation",
]
UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
NEEDLE = r"One of the special magic (?:number|uuid)s for ([\w-]+) is: ([\w-]+)\."


@pytest.fixture(scope="module")
def writers(smollm2, gemma3):
    return {
        "SmolLM2": Writer(AutoTokenizer.from_pretrained(smollm2)),
        "Gemma": Writer(AutoTokenizer.from_pretrained(gemma3)),
    }


@pytest.fixture(scope="module")
def text_of(writers):
    """A task's prompts as text, without what a tokenizer adds, and their answers."""

    def make(name, tokens=1000, seeds=range(3), model="SmolLM2"):
        samples = TASKS[name].samples(seeds, writers[model], tokens)
        decode = writers[model].tokenizer.decode
        return [(decode(sample.prompt), sample.answers) for sample in samples]

    return make


def test_all_tasks_of_ruler_and_those_beside_them_are_there():
    assert len(RULER) == 13 and list(TASKS)[8:] == RULER[:11] + list(QUESTIONS) + OTHERS[2:]


@pytest.mark.parametrize("model", ("SmolLM2", "Gemma"))
@pytest.mark.parametrize("name", [*RULER, *OTHERS])
def test_samples_fill_their_length_and_can_be_answered(name, model, writers):
    task, writer = TASKS[name], writers[model]
    metric = METRICS[task.metric]
    for tokens in (500, 1000, 2000, 8000):
        seeds = range(5) if tokens < 1000 else range(2)
        samples = task.samples(seeds, writer, tokens)
        assert len({tuple(sample.prompt) for sample in samples}) == len(seeds)
        for sample in samples:
            assert 0.9 * tokens <= len(sample.prompt) <= tokens
            text = writer.tokenizer.decode(sample.prompt)
            assert all(answer in text for answer in sample.answers)
            assert metric(" " + ", ".join(sample.answers), sample.answers) == 1
            assert metric(f" {sample.answers[0][1:]}zz", sample.answers[:1]) == 0
            assert writer.count(", ".join(sample.answers)) + 1 <= task.max_tokens
    again = task.samples(range(1, 2), writer, 500)[0]
    assert again == task.samples(range(2), writer, 500)[1]


@pytest.mark.parametrize("name", [*RULER, *OTHERS])
def test_a_base_model_continues_an_answer_after_the_token_that_begins_a_text(name, writers):
    tokenizer = writers["Gemma"].tokenizer
    for task in (TASKS[name], TASKS["needle in prose"], TASKS["code completion"]):
        (sample,) = task.samples(range(1), writers["Gemma"], 500)
        assert sample.prompt[0] == tokenizer.bos_token_id
        assert tokenizer.bos_token_id not in sample.prompt[1:]
        assert "<|im_start|>" not in tokenizer.decode(sample.prompt)
    last = tokenizer.decode(TASKS[name].samples(range(1), writers["Gemma"], 500)[0].prompt)
    last = last.split("\n")[-1]
    assert last and not last.endswith((" ", "?")), "the beginning of an answer"


def test_what_begins_a_prompt_is_what_the_tokenizer_says(writers):
    chat, base = writers["SmolLM2"], writers["Gemma"]
    assert chat.plain("hello") == chat.tokenizer.encode("hello")
    assert base.plain("hello") == [2, *base.tokenizer.encode("hello")]
    decode = base.tokenizer.decode
    assert decode(base.chat("Who?", "It is")) == "<bos>Who?\n\nIt is"
    assert decode(base.chat("Who?")) == "<bos>Who?\n\nAnswer:"
    assert (
        decode(base.conversation(["a", "b", "c"], "It is"))
        == "<bos>User: a\n\nAssistant: b\n\nUser: c\n\nAssistant: It is"
    )
    text = chat.tokenizer.decode(chat.conversation(["a", "b", "c"], "It is"))
    assert re.findall(r"<\|im_start\|>(\w+)\n(.*)", text)[1:] == [
        ("user", "a<|im_end|>"),
        ("assistant", "b<|im_end|>"),
        ("user", "c<|im_end|>"),
        ("assistant", "It is"),
    ]

    class AddsOne:
        """As Llama's: begins every text by itself, but has a chat template that does so too."""

        chat_template, bos_token_id = "", 7

        def encode(self, text, add_special_tokens=True):
            return [7] * add_special_tokens + list(text.encode())

        def apply_chat_template(self, messages, **_):
            return messages[0]["content"]

    assert Writer(AddsOne()).plain("a") == [7, 97] and Writer(AddsOne()).chat("a") == [97]


def test_prompts_are_fitted_to_a_length(writers):
    writer, tried = writers["SmolLM2"], []

    def uneven(count):
        tried.append(count)
        return [0] * (10 + count + count // 7 * 3)

    for length in (10, 11, 100, 5000):
        ids = writer.fit(uneven, length, 10_000)
        assert 0.98 * length - 4 <= len(ids) <= length
    assert len(tried) < 40
    assert len(writer.fit(uneven, 5000, 20)) == len(uneven(20)), "all that there are"
    with pytest.raises(ValueError, match="at least 10 tokens are needed, not 9"):
        writer.fit(uneven, 9, 100)


def test_needles_stay_in_order_where_they_are_at_the_same_place():
    assert haystack.hidden(["a", "b", "c"], [0.5, 0.5, 0], ["1", "2"]) == ["c", "1", "a", "b", "2"]
    assert haystack.last_words(["a b", "c d e", "f"], 3) == ["d e", "f"]
    assert haystack.last_words(["a b", "c"], 3) == ["a b", "c"]
    assert haystack.last_words(["a b", "c"], 0) == []


def test_words_are_as_many_as_asked_and_differ():
    for make in (words.words, words.names, words.uuids):
        assert len(set(make(random.Random(0), 5000))) == 5000
    assert len(set(words.made_up(random.Random(0), 200, 2))) == 200


@pytest.mark.parametrize("name", NIAH)
@pytest.mark.parametrize("model", ("SmolLM2", "Gemma"))
def test_needles_asked_for_are_in_the_text(name, model, text_of):
    keys, asked, per_key = {
        "niah multikey 1": (4, 1, 1),
        "niah multikey 2": (None, 1, 1),
        "niah multikey 3": (None, 1, 1),
        "niah multivalue": (1, 1, 4),
        "niah multiquery": (4, 4, 1),
    }.get(name, (1, 1, 1))
    for text, answers in text_of(name, model=model):
        found = re.findall(NEEDLE, text)
        question = re.search(r"What (?:is|are all) the special magic \w+ for (.*) mentioned", text)
        wanted = re.split(r", and |, ", question[1])
        assert sorted(v for k, v in found if k in wanted) == sorted(answers)
        assert len(wanted) == asked and len(answers) == asked * per_key
        assert len({k for k, _ in found}) == keys or keys is None
        for key, value in found:
            is_uuid = name in ("niah single 3", "niah multikey 3")
            assert re.fullmatch(UUID if is_uuid else r"\d{7}", value)
            assert re.fullmatch(UUID if name == "niah multikey 3" else "[a-z]+-[a-z]+", key)
        if keys is None:
            body = text.split("Remember them.\n\n")[1].split("\n\nWhat is")[0].split("\n")
            needles = [line for line in body if re.fullmatch(NEEDLE, line)]
            # One may be cut, to fill the length.
            assert len(body) - len(needles) <= 1 and len(needles) == len(found) > 8


def test_the_depths_of_needles_differ(text_of):
    places = [t.index(a[0]) / len(t) for t, a in text_of("niah single 1", seeds=range(20))]
    assert min(places) < 0.3 and max(places) > 0.7


@pytest.mark.parametrize("model", ("SmolLM2", "Gemma"))
def test_a_chain_of_variables_has_four_hops(model, text_of):
    for text, answers in text_of("variable tracking", model=model):
        value = re.findall(r"have the value (\d+) in the text above\?", text)[-1]
        lines = re.findall(r"^VAR ([A-Z]{5}) = (?:VAR )?(\w+)$", text, re.MULTILINE)
        # A base model is shown another chain before the one asked about.
        assert len(lines) == (10 if model == "Gemma" else 5)
        known = [value]
        for variable, of in lines:
            if of in known:
                known.append(variable)
        assert known[1:] == answers and len(answers) == 5
        assert sum(of == value for _, of in lines) == 1, "the others by four hops"


@pytest.mark.parametrize("tokens, often, seldom", ((1000, 6, 1), (8000, 30, 3)))
def test_common_words_are_more_often_there(tokens, often, seldom, text_of):
    for text, answers in text_of("common words", tokens):
        numbers, listed = zip(*re.findall(r"(\d+)\. (\w+)", text))
        assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
        counts = Counter(listed)
        assert {word for word, n in counts.items() if n == often} == set(answers)
        assert set(counts.values()) == {often, seldom} and len(answers) == 10


@pytest.mark.parametrize("tokens", (1000, 8000))
def test_coded_words_follow_zipfs_law(tokens, text_of):
    for text, answers in text_of("frequent words", tokens):
        coded = text.split("is there.\n\n")[1].split("\n\nQuestion")[0].split()
        ranked = Counter(coded).most_common()
        assert [word for word, _ in ranked[:4]] == ["....", *answers]
        assert len(ranked) == tokens // 50
        for rank, (_, count) in enumerate(ranked, 1):
            share = 6 / (math.pi * rank) ** 2
            assert count / len(coded) == pytest.approx(share, rel=0.15, abs=2 / len(coded))


def _sentences_with(name, text):
    return [s for s in re.split(r"(?<=\.)\s", text.split("Document 1:")[1]) if name in s]


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("model", ("SmolLM2", "Gemma"))
def test_documents_answer_their_questions(name, model, text_of):
    subject = r"[A-Z]\w+ (?:& )?[A-Z]\w+|[A-Z]\w+"
    for text, answers in text_of(name, seeds=range(10), model=model):
        questions = re.findall(r"Question: (.*\?)", text)
        assert len(questions) == len(answers) == (2 if name == "two questions" else 1)
        assert (text.index("Question:") < text.index("Document 1:")) == ("first" in name)
        for question, answer in zip(questions, answers):
            (asked,) = re.findall(subject, re.sub("^[A-Z]", "w", question))
            answering = _sentences_with(answer, text)
            if name != "qa 2":
                assert any(asked in s for s in answering)
                continue
            # The subject's documents do not hold the answer; those of what they tell of do.
            assert not any(asked in s for s in answering)
            between = {w for s in _sentences_with(asked, text) for w in re.findall(subject, s)}
            assert any(w in s for s in answering for w in between - {asked})


@pytest.mark.parametrize("model", ("SmolLM2", "Gemma"))
def test_a_pair_is_asked_for_by_its_key(model, text_of):
    for text, (answer,) in text_of("key-value retrieval", model=model):
        pairs = dict(re.findall(r'"([0-9a-f]{8})": "([0-9a-f]{8})",', text))
        key = re.search(r'"(\w+)": "$', text)[1]
        assert pairs[key] == answer and len(pairs) > 20


@pytest.mark.parametrize("name", MANY_SHOT)
def test_labels_are_known_from_the_examples_alone(name, text_of):
    labels = int(re.search(r"\d+", name)[0])
    for tokens in (1000, 8000):
        for text, (answer,) in text_of(name, tokens):
            shown = re.findall(r"(\w+): (\w+)\n", text)
            asked = re.search(r"\n(\w+):$", text)[1]
            assert {label for item, label in shown if item == asked} == {answer}
            assert len(set(dict(shown).items())) == len(set(shown)), "an item has one label"
            seen = len({label for _, label in shown})
            assert Counter(item for item, _ in shown)[asked] >= 3
            # At 1,000 tokens there is no place for 200.
            assert seen == labels or (labels, tokens) == (200, 1000) and seen == len(shown) - 2 > 50


def test_rules_for_the_answer_are_far_from_the_question(text_of):
    for text, (word, value) in text_of("instruction at the start"):
        assert text.index(f'begins with the word "{word}"') < 0.2 * len(text)
        assert f"is {value}." in text
    for text, (left, value, right) in text_of("instruction in the middle"):
        place = text.index(f"between {left} and {right}") / len(text)
        assert 0.2 < place < 0.8 and text.count(left) == text.count(right) == 2
        assert f"is {value}." in text
    for text, (code,) in text_of("code words"):
        (place,) = re.findall(r"lives in (\w+)\.", text)
        assert dict(re.findall(r"^(\w+): (\w+)$", text, re.MULTILINE))[place] == code
        assert text.count(code) == 1


def test_the_first_turn_holds_what_the_last_asks(text_of):
    for text, (value,) in text_of("conversation"):
        turns = text.split("<|im_start|>")[2:]
        name = re.search(r"What is the special number of ([\w-]+)\?", turns[-2])[1]
        assert f"The special number of {name} is {value}." in turns[0] and len(turns) > 6
        assert not any(value in turn for turn in turns[1:])
