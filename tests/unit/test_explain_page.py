"""The page of ``lazyllm explain`` in a real browser."""

import io
import itertools
import random
import time

import pytest

from benchmarks.chromium import chromium, launch
from lazyllm_vllm.observe.explain.explanation import Explanation, Step
from lazyllm_vllm.observe.explain.render import render
from lazyllm_vllm.observe.explain.token_texts import Token

WORDS = ("the", " sky", " is", " </script>", "<b>", " 🙂", "", "\t", " 日本", " &amp;", ".\n")
STEPS = 12


def _explanation(size: int) -> Explanation:
    """A prompt of four stages, kept in runs as pooled scores keep it, each step reviving some."""
    rng = random.Random(size)
    kept = [list(range(size))]
    for share in (0.6, 0.5, 0.4):
        chosen, at = [], 0
        while at < len(kept[-1]):
            length = rng.randrange(1, 20)
            chosen += kept[-1][at : at + length] if rng.random() < share else []
            at += length
        kept.append(chosen)
    has, steps = [set(positions) for positions in kept], []
    for _ in range(STEPS):
        step = Step(selected=[[]], revived=[[]])
        for stage in (1, 2, 3):
            dropped = sorted(has[stage - 1] - has[stage])
            back = sorted(rng.sample(dropped, min(3, len(dropped))))
            has[stage] |= set(back)
            before = has[1] if stage == 1 else set(step.selected[-1])
            chosen = {p for p in before & has[stage] if rng.random() < 0.8} | set(back)
            step.selected.append(sorted(chosen & before))
            step.revived.append(back)
        steps.append(step)
    return Explanation(
        model="a model",
        layers=[(1, 4), (5, 10), (11, 21), (22, 30)],
        prompt=[_token(rng.choice(WORDS)) for _ in range(size)],
        answer=[_token(f" word{i}") for i in range(STEPS + 1)],
        kept=kept,
        places=[[], *([0] * size for _ in kept[1:])],
        steps=steps,
        share_computed=0.5,  # the page counts for itself
    )


def _token(text: str) -> Token:
    return Token(id=5, text=text, piece=text or "<0xE2>")


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if chromium() is None:
        pytest.skip("no Chromium: tests/env/make_chromium.sh had no npm package to make it of")
    with api.sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser, tmp_path):
    """Opens an explanation's page; nothing may go wrong in it, and nothing be asked of others."""
    said, asked, pages = [], [], []

    def open_page(explanation: Explanation, **options):
        page = browser.new_page(viewport={"width": 1200, "height": 800}, **options)
        pages.append(page)
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        file = tmp_path / f"{len(pages)}.html"
        file.write_text(render(explanation), encoding="utf-8")
        page.goto(file.as_uri())
        page.wait_for_function("story.isUnpacked()")
        return page

    yield open_page
    for page in pages:
        page.close()
    assert not said
    assert all(url.startswith(("file:", "data:")) for url in asked)


def _shown(page) -> dict[str, int]:
    """Tokens by how they look: by depth, ``back`` (revived) and ``gap`` (filtered out)."""
    runs = page.locator("#prompt span").evaluate_all(
        "spans => spans.map(s => [s.className, s.dataset.depth, s.dataset.end - s.dataset.first])"
    )
    counts = {"back": 0, "gap": 0}
    for classes, depth, size in runs:
        where = "gap" if classes == "gap" else depth
        counts[where] = counts.get(where, 0) + size
        counts["back"] += size if "back" in classes.split() else 0
    return counts


def _has(told: Explanation, stage: int, step: int) -> set[int]:
    """The tokens with keys in a stage after a step."""
    return set(told.kept[stage]).union(*(one.revived[stage] for one in told.steps[:step]))


def _slide(page, name: str, value: int) -> None:
    page.locator(f"#{name}").fill(str(value))


@pytest.mark.parametrize("size", [100, 30_000])
def test_what_is_shown_is_what_was(size, open_page):
    told = _explanation(size)
    began = time.monotonic()
    page = open_page(told)
    assert time.monotonic() - began < 6, "slow to open"
    assert page.locator("*").count() < 400 + size / 4

    # Every step and stage, by the sliders.
    for step in (0, 1, STEPS):
        began = time.monotonic()
        _slide(page, "step", step)
        assert time.monotonic() - began < 2, "slow to slide"
        has = [_has(told, stage, step) for stage in range(4)]
        shown = _shown(page)
        for stage in range(4):
            deeper = len(has[stage + 1]) if stage < 3 else 0
            assert shown.get(str(stage), 0) == len(has[stage]) - deeper
        back = {p for one in told.steps[:step] for stage in one.revived for p in stage}
        assert shown["back"] == len(back)
        cells = page.locator("#counts tr:not(:first-child)").all_inner_texts()
        counts = [[x.replace(",", "") for x in cell.split("\t")] for cell in cells]
        assert [int(cell[1]) for cell in counts] == [len(kept) for kept in told.kept]
        revived = [len(has[stage]) - len(told.kept[stage]) for stage in range(4)]
        assert [int(cell[3]) for cell in counts] == revived
        pairs = sum(len(has[s]) * (b - a + 1) for s, (a, b) in enumerate(told.layers))
        assert f"{100 * pairs / (30 * size):.1f}%" in page.inner_text("#share")
    for stage in (1, 3):
        _slide(page, "stage", stage)
        assert _shown(page).get("3", 0) == len(_has(told, stage, STEPS))

    # What a step chose, and filters.
    page.select_option("#view", "chosen")
    assert _shown(page).get("3", 0) == len(told.steps[-1].selected[3])
    page.select_option("#view", "depth")
    for name, filtered in (("dropped", len(has[3])), ("present", size - len(has[3]))):
        page.select_option("#filter", name)
        assert _shown(page)["gap"] == filtered
    page.select_option("#filter", "revived")
    assert _shown(page)["gap"] == size - sum(len(one.revived[3]) for one in told.steps)

    # A word of the answer, and what it called back.
    page.select_option("#filter", "all")
    page.locator("#answer button").nth(1).click()
    assert page.locator("#step").input_value() == "2"
    page.locator("#called button").first.click()
    assert f"Token {told.steps[1].revived[1][0]:,} of" in page.inner_text("#token")
    assert "at step 2 by  word1" in page.inner_text("#token")


def test_pointer_keys_and_search(open_page):
    told = _explanation(30_000)
    page = open_page(told)
    told_of = page.locator("#token")
    page.locator("#prompt").focus()
    for key, position in (("Home", 0), ("ArrowRight", 1), ("End", 29_999), ("ArrowLeft", 29_998)):
        page.keyboard.press(key)
        assert f"Token {position:,} of 30,000" in told_of.inner_text()
    revived = sorted({p for one in told.steps for stage in one.revived for p in stage})
    page.keyboard.press("Home")
    page.keyboard.press("r")
    first = next(p for p in revived if p > 0)
    depth = told.depths()[first]
    text = told_of.inner_text()
    assert f"Token {first:,} of" in text and "Revived in" in text
    layer = told.layers[depth - 1][1]
    assert f"Kept through layer {layer}, dropped after layer {layer}." in text

    # The strip leads anywhere; pointing tells of a token and of no other.
    box = page.locator("#strip").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 8)
    assert "Token 15,000 of" in told_of.inner_text()
    page.wait_for_timeout(100)
    at = page.evaluate(
        "(([r]) => [r.left + r.width / 2, r.top + r.height / 2])"
        "([...CSS.highlights.get('cursor')][0].getClientRects())"
    )
    assert 0 < at[1] < 800, "the token is in sight"
    page.mouse.move(*at)
    assert page.locator("#tip").inner_text() == told_of.inner_text()

    page.keyboard.press("/")
    page.keyboard.type("</SCRIPT><b>")
    whole = "".join(token.text for token in told.prompt)
    found = whole.count("</script><b>")
    assert found > 10 and page.inner_text("#found").startswith(f"{found} found")
    page.keyboard.press("Enter")
    assert "</script>" in told_of.inner_text() and page.inner_text("#found") == f"1 of {found}"
    assert page.evaluate("CSS.highlights.get('found').size") >= min(found, 500) * 2


def _picture(page) -> bytes:
    """A PNG. On a busy machine Chromium may have none yet to give, and says so."""
    from playwright.sync_api import Error

    for _ in range(5):
        try:
            return page.screenshot()
        except Error as error:
            assert "Unable to capture screenshot" in str(error)
            page.wait_for_timeout(300)
    raise AssertionError("Chromium gave no picture")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("ink", ["no colour", "no shade", "print"])
def test_depths_differ_without_colour(scheme, ink, open_page):
    """The same words at each depth and, last, revived: in grey, and with underlines alone."""
    Image = pytest.importorskip("PIL.Image")
    ImageChops = pytest.importorskip("PIL.ImageChops")
    told = _explanation(100).model_copy(
        update={
            "prompt": [_token("word.\n")] * 5,
            "kept": [[0, 1, 2, 3, 4], [1, 2, 3], [2, 3], [3]],
            "places": [[], [], [], []],
            "steps": [Step(selected=[[], [4], [], []], revived=[[], [4], [], []])],
        }
    )
    page = open_page(told, color_scheme=scheme)
    _slide(page, "step", 1)
    if ink == "print":
        page.emulate_media(media="print")
    if ink == "no shade":
        page.add_style_tag(content=".run { background: none !important }")
    assert page.locator("#controls").is_visible() == (ink != "print")
    runs = page.locator("#prompt span").all()
    assert len(runs) == 5
    whole = Image.open(io.BytesIO(_picture(page))).convert("L")
    corners = [(box["x"] - 3, box["y"] - 3) for box in (run.bounding_box() for run in runs)]
    pictures = [whole.crop((x, y, x + 70, y + 24)) for x, y in corners]
    for one, other in itertools.combinations(pictures, 2):
        difference = ImageChops.difference(one, other).histogram()
        assert sum(difference[24:]) > 30, "pixels that are clearly lighter or darker"
