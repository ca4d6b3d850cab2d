"""The page at `/` in headless Chromium: a whole conversation, sessions, settings, themes, and all of it by keyboard.

Needs playwright (of the `dev` extra) and a Chromium, which `CHROMIUM` may name.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.server.fake_engine import FakeEngine
from tests.server.live_server import Live, make_settings, wait_for

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = os.environ.get("CHROMIUM") or next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium; the variable CHROMIUM names one"),
]
Page, expect = Any, sync_api.expect
WAIT = 120_000
"""Milliseconds for what takes a moment, on a machine that does much else."""
expect.set_options(timeout=WAIT)
ANSWER = "article.assistant .body"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Page]:
    """A page of a browser that has seen nothing; errors of its script and of its policy fail the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 800}, color_scheme="light")
    found = context.new_page()
    found.set_default_timeout(WAIT)
    faults: list[str] = []
    found.on("pageerror", lambda error: faults.append(str(error)))
    found.on(
        "console",
        lambda line: (
            faults.append(line.text) if "Content Security" in line.text or "TrustedHTML" in line.text else None
        ),
    )
    yield found
    context.close()
    assert faults == []


def ready(page: Page, live: Live) -> None:
    page.goto(live.url)
    expect(page.locator("#state")).to_have_attribute("data-state", "ready")


def ask(page: Page, live: Live, text: str, answer: str) -> None:
    """Asks and waits for an answer that the engine is told to give."""
    live.engine.script.append(answer)
    before = page.locator("article.assistant").count()
    page.fill("#prompt", text)
    page.keyboard.press("Enter")
    expect(page.locator("article.assistant")).to_have_count(before + 1)
    expect(page.locator("#send")).to_be_visible()


def sessions(page: Page) -> list[str]:
    return [text.strip() for text in page.locator("#session-list button > span:first-child").all_inner_texts()]


def sent(live: Live) -> str:
    """What the engine was asked last."""
    prompt: str = live.engine.tokenizer.decode(live.engine.requests[-1].prompt)
    return prompt


def filled(page: Page, dialog: str, name: str) -> None:
    """Fills a dialog with one field and sends it."""
    page.fill(f"#{dialog}-value", name)
    page.locator(f"#{dialog} [type=submit]").click()
    expect(page.locator(f"#{dialog}")).to_be_hidden()


def test_a_conversation_goes_on_after_a_restart_and_a_reload(page: Page) -> None:
    engine = FakeEngine()
    live = Live(make_settings(), engine)
    try:
        ready(page, live)
        ask(page, live, "My name is Ada.", "Hello **Ada**")
        expect(page.locator(f"{ANSWER} strong")).to_have_text("Ada")
        (name,) = sessions(page)
        assert [session for _, session in engine.sessions.live] == [name]
        gates = page.locator(f"{ANSWER} .t")
        assert [float(one.get_attribute("data-gate")) for one in gates.all()][:2] == [0.2, 0.1]  # H, e
        gates.nth(1).hover()
        expect(page.locator("#tip")).to_have_text("memory 10 %")
        expect(page.locator("#window-said")).to_contain_text("of 512")
        live.stop()
        expect(page.locator("#state")).to_have_attribute("data-state", "away")
        page.fill("#prompt", "Who am I?")
        page.keyboard.press("Enter")
        expect(page.locator("#problem")).to_contain_text("sent again")
        again = FakeEngine()
        again.sessions.live = engine.sessions.live
        again.script.append("You are Ada.")
        live = Live(make_settings(), again, port=live.port)
        expect(page.locator(ANSWER).last).to_have_text("You are Ada.")
        expect(page.locator("#problem")).to_be_hidden()
        for part in ("My name is Ada.", "Hello **Ada**", "Who am I?"):
            assert part in sent(live)
        page.reload()
        expect(page.locator("#session-name")).to_have_text(name)
        expect(page.locator("article")).to_have_count(4)
        expect(page.locator("#state")).to_have_attribute("data-state", "ready")
        ask(page, live, "And now?", "Still Ada.")
        assert live.engine.requests[-1].memory.session.session_id == name
    finally:
        live.stop()


def test_an_answer_that_is_cut_off_is_kept_and_asked_anew(page: Page) -> None:
    engine = FakeEngine(delay=0.05)
    live = Live(make_settings(), engine)
    try:
        ready(page, live)
        engine.script.append("x" * 2000)
        page.fill("#prompt", "Go on")
        page.keyboard.press("Enter")
        expect(page.locator(ANSWER)).to_contain_text("xxx")
        live.stop()
        expect(page.locator("#problem")).to_be_visible()
        expect(page.locator("article.assistant .foot .note")).to_contain_text(re.compile("connection was lost|failed"))
        again = FakeEngine()
        again.script.append("all of it")
        live = Live(make_settings(), again, port=live.port)
        expect(page.locator("#state")).to_have_attribute("data-state", "ready")
        page.get_by_role("button", name="Regenerate").click()
        expect(page.locator(ANSWER)).to_have_text("all of it")
        assert again.requests[-1].memory.regenerate
    finally:
        live.stop()


def test_sessions_are_renamed_branched_saved_loaded_and_deleted(page: Page, live: Live) -> None:
    ready(page, live)
    ask(page, live, "one", "first")
    page.click("#rename")
    filled(page, "name", "Harbour")
    expect(page.locator("#session-name")).to_have_text("Harbour")
    assert sessions(page) == ["Harbour"]
    page.click("#save")
    expect(page.locator("#said")).to_contain_text("Saved")
    ask(page, live, "two", "second")
    page.get_by_role("button", name="Branch off after this answer").first.click()
    filled(page, "name", "Twig")
    expect(page.locator("article")).to_have_count(2)
    assert {session for _, session in live.engine.sessions.live} == {"Harbour", "Twig"}
    page.click("#rename")
    page.fill("#name-value", "Harbour")
    page.locator("#name-done").click()
    expect(page.locator("#name .problem")).to_contain_text("exists already")
    page.keyboard.press("Escape")
    page.locator("#session-list button", has_text="Harbour").click()
    expect(page.locator("article")).to_have_count(4)
    page.click("#load")
    page.click("#sure-done")
    expect(page.locator("article")).to_have_count(2)
    page.click("#delete")
    page.click("#sure-done")
    expect(page.locator("#session-list li")).to_have_count(1)
    assert sessions(page) == ["Twig"]
    assert {session for _, session in live.engine.sessions.live} == {"Twig"}
    expect(page.locator("#session-name")).to_have_text("New session")


def test_messages_are_edited_answers_regenerated_and_stopped(page: Page, live: Live) -> None:
    ready(page, live)
    ask(page, live, "colour", "red")
    ask(page, live, "fruit", "apple")
    live.engine.script.append("pear")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator(ANSWER).last).to_have_text("pear")
    assert live.engine.requests[-1].memory.regenerate
    assert "apple" not in sent(live)
    live.engine.script.append("blue")
    page.get_by_role("button", name="Edit this message").first.click()
    page.locator(".edit textarea").fill("favourite colour")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER)).to_have_text(["blue"])
    assert "fruit" not in sent(live)
    assert "favourite colour" in sent(live)
    live.engine.delay = 0.02
    live.engine.script.append("y" * 5000)
    page.fill("#prompt", "endless")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER).last).to_contain_text("yy")
    page.click("#stop")
    expect(page.locator("article.assistant .foot .note").last).to_contain_text("stopped")
    expect(page.locator("#prompt")).to_be_focused()
    wait_for(lambda: live.engine.running == 0)


def test_text_of_a_model_never_becomes_markup(page: Page, live: Live) -> None:
    ready(page, live)
    hostile = (
        '<img src=x onerror="alert(1)"> <script>alert(2)</script>\n\n'
        "[bad](javascript:alert(3)) [good](https://example.org/a)\n\n"
        "![i](https://example.org/b.png)\n\n```py\nif a < b: pass\n```\n\n- one\n- two `<b>`\n\n"
        "| a | b |\n|---|---|\n| 1 | *2* |"
    )
    ask(page, live, "x", hostile)
    body = page.locator(ANSWER)
    assert body.locator("img, script").count() == 0
    assert [one.get_attribute("href") for one in body.locator("a").all()] == [
        "https://example.org/a",
        "https://example.org/b.png",
    ]
    assert all("noopener" in one.get_attribute("rel") for one in body.locator("a").all())
    assert '<img src=x onerror="alert(1)">' in body.inner_text()
    expect(body.locator("pre code")).to_have_text("if a < b: pass")
    assert body.locator("li").all_inner_texts() == ["one", "two <b>"]
    expect(body.locator("td em")).to_have_text("2")
    page.reload()
    expect(page.locator(f"{ANSWER} pre code")).to_have_text("if a < b: pass")
    assert page.locator(f"{ANSWER} img").count() == 0


def test_settings_are_those_the_server_describes_and_errors_name_the_field(page: Page, live: Live) -> None:
    ready(page, live)
    page.click("#open-settings")
    fields = page.locator("#settings-atlas [data-name]")
    expect(fields.first).to_be_visible()
    described = set(live.http.get("/schema/openapi.json").json()["components"]["schemas"]["AtlasOptions"]["properties"])
    shown = {one.get_attribute("data-name") for one in fields.all()}
    assert shown == described - {"session_id", "regenerate", "token_gates"}
    defaults = live.http.get("/v1/atlas/config").json()["data"]
    assert page.locator("#set-atlas-window_size").get_attribute("placeholder") == str(defaults["window_size"])
    page.fill("#set-atlas-window_size", "256")
    page.fill("#set-atlas-blend_ratio", "much")
    page.locator("#settings [type=submit]").click()
    expect(page.locator("#settings .problem")).to_have_text("atlas.blend_ratio: must be a number")
    page.fill("#set-atlas-blend_ratio", "0.75")
    page.fill("#set-system", "Be brief.")
    page.fill("#set-chat-temperature", "0.1")
    page.locator("#settings [type=submit]").click()
    expect(page.locator("#settings")).to_be_hidden()
    ask(page, live, "x", "y")
    asked = live.engine.requests[-1]
    assert (asked.memory.window_size, asked.memory.blend_ratio, asked.sampling.temperature) == (256, 0.75, 0.1)
    assert "Be brief." in sent(live)
    page.click("#open-settings")
    page.fill("#set-atlas-window_size", "200")
    page.locator("#settings [type=submit]").click()
    page.fill("#prompt", "again")
    page.keyboard.press("Enter")
    expect(page.locator("#problem")).to_contain_text("atlas.window_size")
    page.get_by_role("button", name="Open settings").click()
    expect(page.locator("#set-atlas-window_size")).to_be_focused()
    page.click("#settings-reset")
    page.select_option("#set-atlas-enabled", "false")
    page.locator("#settings [type=submit]").click()
    live.engine.script.append("plain")
    page.fill("#prompt", "without")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER).last).to_have_text("plain")
    assert live.engine.requests[-1].memory is None


def test_a_key_is_kept_for_the_tab_and_in_no_address(page: Page, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key:team\n")
    live = Live(make_settings(server={"api_keys_file": str(keys)}), FakeEngine())
    addresses: list[str] = []
    page.on("request", lambda request: addresses.append(request.url))
    try:
        page.goto(live.url)
        expect(page.locator("#key")).to_be_visible()
        page.fill("#key-value", "wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key .problem")).to_be_visible()
        page.fill("#key-value", "secret-key")
        page.keyboard.press("Enter")
        expect(page.locator("#key")).to_be_hidden()
        expect(page.locator("#model")).to_have_text("fake-7b")
        ask(page, live, "x", "y")
        assert page.evaluate("() => Object.values(localStorage).join()").count("secret-key") == 0
        assert page.evaluate("() => sessionStorage.getItem('atlas.key')") == "secret-key"
        page.reload()
        expect(page.locator("#model")).to_have_text("fake-7b")
        page.click("#open-settings")
        page.click("#open-key")
        page.fill("#key-value", "secret-key")
        page.check("#key-keep")
        page.locator("#key [type=submit]").click()
        expect(page.locator("#key")).to_be_hidden()
        assert page.evaluate("() => localStorage.getItem('atlas.key')") == "secret-key"
        assert page.evaluate("() => sessionStorage.getItem('atlas.key')") is None
        assert not any("secret" in address for address in addresses)
        assert all(address.startswith(live.url) for address in addresses)
    finally:
        live.stop()


def test_the_theme_is_the_systems_or_the_one_chosen(page: Page, live: Live) -> None:
    def ground() -> Any:
        return page.evaluate("() => getComputedStyle(document.body).backgroundColor")

    ready(page, live)
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert light != dark
    page.click("#theme")
    assert (ground(), page.locator("#theme").inner_text()) == (light, "Light")
    page.reload()
    expect(page.locator("#theme")).to_have_text("Light")
    assert ground() == light
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert (ground(), page.locator("#theme").inner_text()) == (dark, "Dark")


def focused(page: Page) -> str:
    found: str = page.evaluate("() => document.activeElement.id || document.activeElement.textContent")
    return found


def tab_back_to(page: Page, wanted: str) -> None:
    for _ in range(60):
        page.keyboard.press("Shift+Tab")
        if wanted in focused(page):
            width = page.evaluate("() => getComputedStyle(document.activeElement).outlineWidth")
            assert width != "0px", "the focus can be seen"
            return
    raise AssertionError(f"{wanted} cannot be reached")


def test_everything_can_be_done_with_the_keyboard(page: Page, live: Live) -> None:
    ready(page, live)
    tab_back_to(page, "Skip")
    page.keyboard.press("Enter")
    expect(page.locator("#prompt")).to_be_focused()
    live.engine.script.append("0123456789")  # gates 0.8, 0.9, 0.0, …
    page.keyboard.type("hello")
    page.keyboard.press("Enter")
    expect(page.locator(ANSWER)).to_have_text("0123456789")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    tab_back_to(page, "0123456789")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#tip")).to_have_text("memory 90 %")
    expect(page.locator("#said")).to_have_text("1: 90 %")
    tab_back_to(page, "rename")
    page.keyboard.press("Enter")
    page.keyboard.type("By keyboard")
    page.keyboard.press("Enter")
    expect(page.locator("#session-name")).to_have_text("By keyboard")
    page.focus("#prompt")
    tab_back_to(page, "delete")
    page.keyboard.press("Enter")
    expect(page.locator("#sure")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#sure")).to_be_hidden()
    assert focused(page) == "delete"
    assert sessions(page) == ["By keyboard"]


def test_every_control_has_a_name_for_who_cannot_see_it(page: Page, live: Live) -> None:
    ready(page, live)
    ask(page, live, "x", "```py\ncode\n```\ntext")
    page.click("#open-settings")
    expect(page.locator("#settings-atlas [data-name]").first).to_be_visible()
    page.keyboard.press("Escape")
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "textbox",
        "combobox",
        "checkbox",
        "link",
        "dialog",
        "navigation",
        "complementary",
        "log",
        "progressbar",
    }
    nameless = [
        node
        for node in tree
        if not node.get("ignored")
        and node.get("role", {}).get("value") in roles
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []
    assert sum(node.get("role", {}).get("value") == "button" for node in tree) > 10
    levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map((one) => Number(one.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1


def test_on_a_narrow_screen_nothing_is_cut_off(page: Page, live: Live) -> None:
    page.set_viewport_size({"width": 360, "height": 640})
    ready(page, live)
    ask(page, live, "x", "word " * 60 + "\n\n```\n" + "long" * 60 + "\n```")
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    for name in ("sessions", "memory"):
        button = page.locator(f"#show-{name}")
        expect(page.locator(f"#{name}")).to_be_hidden()
        button.click()
        expect(page.locator(f"#{name}")).to_be_visible()
        assert button.get_attribute("aria-expanded") == "true"
        page.keyboard.press("Escape")
        expect(page.locator(f"#{name}")).to_be_hidden()
        expect(button).to_be_focused()


def test_a_server_without_a_memory_is_chatted_with_all_the_same(page: Page) -> None:
    live = Live(make_settings(atlas={"enabled": False}), FakeEngine())
    try:
        ready(page, live)
        ask(page, live, "x", "plainly")
        expect(page.locator(ANSWER)).to_have_text("plainly")
        expect(page.locator("#session-note")).to_contain_text("no memory")
        page.click("#rename")
        filled(page, "name", "Here alone")
        assert sessions(page) == ["Here alone"]
    finally:
        live.stop()
