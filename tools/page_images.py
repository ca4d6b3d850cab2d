"""Takes the pictures of docs/guides/page.md from a running server: `make page-images`.

It asks the server as a person would, in headless Chromium, so the server must be one whose sessions may be added to.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

OUTPUT = Path(__file__).parents[1] / "docs" / "images"
PATIENCE = 600_000
ASKED = (
    "The code of the harbour gate is Kestrel 40713. The keeper’s name is Marta Lindqvist, and her boat is the Blue Heron. "
    "Please remember this, and then tell me about lighthouses in a few sentences.",
    "Explain in a few paragraphs how a lighthouse lens works, and why it is built in rings.",
    "Write a Python function that adds two numbers, and explain it.",
    "What is the code of the harbour gate, what is the keeper’s name, and what is her boat called?",
)


def ask(page: Page, text: str) -> None:
    """Asks, and waits for the answer."""
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#send", state="hidden")
    page.wait_for_selector("#send", timeout=PATIENCE)
    page.get_by_text("History").wait_for(timeout=PATIENCE)
    page.wait_for_timeout(1000)  # what the server says of the session afterwards


def main() -> None:
    """Writes docs/images/page-*.png."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:8080/")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
        page.add_init_script(
            """localStorage.setItem("atlas.settings", JSON.stringify(
                 {chat: {temperature: 0, max_completion_tokens: 220, repeat_penalty: 1.1},
                  atlas: {window_size: 256, blend_ratio: 0.7}, system: ""}))"""
        )
        page.goto(given.url)
        page.wait_for_selector("#state[data-state=ready]", timeout=PATIENCE)
        for text in ASKED:
            ask(page, text)
        page.locator(".t[data-g]:not([data-g='0'])").last.hover()
        page.screenshot(path=given.output / "page-light.png")
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=given.output / "page-dark.png")
        page.click("#open-settings")
        page.wait_for_selector("#set-atlas-window_size")
        page.screenshot(path=given.output / "page-settings.png")
        page.keyboard.press("Escape")
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 390, "height": 760})
        page.screenshot(path=given.output / "page-narrow.png")
        browser.close()


if __name__ == "__main__":
    main()
