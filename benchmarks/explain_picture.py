"""The picture in docs/explain.md, of the page that the demo ends with:
python -m benchmarks.explain_picture PAGE
"""

import io
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from benchmarks.chromium import launch

PICTURE = Path(__file__).parents[1] / "docs" / "explain.png"


def main(page_file: Path) -> None:
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
        page.goto(page_file.absolute().as_uri())
        page.wait_for_function("story.isUnpacked()")
        page.locator("#search").fill("pass key is")
        page.keyboard.press("Enter")
        page.locator("#answer button").nth(1).click()
        page.locator("#bar").click(position={"x": 2, "y": 2})  # no focus in the picture
        page.wait_for_timeout(200)
        picture = Image.open(io.BytesIO(page.screenshot()))
        browser.close()
    picture.quantize(64).save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} KB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
