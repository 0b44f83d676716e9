"""Draw the pictures of the web page in the documentation: `python -m tests.serve.screenshots docs`."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from lavis.generation.engine import Engine
from lavis.serve.load import load_chat
from lavis.serve.web import ASSETS, serve_page

TALKS = {
    ("light", "en-US"): [
        ("green_stars", "What is in the picture?"),
        ("", "How many shapes do you see?"),
        ("", "What color do you see?"),
    ],
    ("dark", "zh-CN"): [("blue_squares", "图里有什么？"), ("", "图形是什么颜色？"), ("", "图形在哪里？")],
}
"""(colour scheme, browser's language) to pictures and questions."""


def draw(browser: Browser, url: str, scheme: str, locale: str, file: Path) -> None:
    """Have one conversation and photograph it."""
    page = browser.new_page(color_scheme=scheme, locale=locale, viewport={"width": 1200, "height": 800})
    page.goto(url)
    page.wait_for_selector(f"html[lang={locale[:2]}]")
    page.wait_for_selector("#chat .example")
    page.wait_for_timeout(1000)
    for n, (picture, question) in enumerate(TALKS[scheme, locale], 1):
        if picture:
            page.set_input_files("#box input[type=file]", ASSETS / "shapes" / "pictures" / f"{picture}.png")
            page.wait_for_selector("#box .thumbnail-item img, #box .thumbnail-image")
        page.fill("#box textarea", question)
        page.press("#box textarea", "Enter")
        page.wait_for_function("n => document.querySelectorAll('#chat .bot.message').length == n", arg=n)
        page.wait_for_selector("#regenerate:not([disabled])")
    page.mouse.move(5, 5)
    page.wait_for_timeout(1000)
    Image.open(io.BytesIO(page.screenshot())).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(
        file, optimize=True
    )
    page.close()


def main(folder: Path) -> None:
    """Write chat_web_light.png and chat_web_dark.png."""
    engine = Engine(load_chat(model_type="shapes", device="cpu"))
    page = serve_page(engine, port=7899, block=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for scheme, locale in TALKS:
            draw(browser, page.local_url, scheme, locale, folder / f"chat_web_{scheme}.png")
        browser.close()
    page.close()
    engine.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
