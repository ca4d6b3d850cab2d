"""The page at `/`: what it is made of, by script; `test_server_page_browser` uses it in a browser."""

from __future__ import annotations

import itertools
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.server.live_server import Live, Start
from tests.server.test_server_first_hour import BROWSER

WEB = Path(__file__).parents[2] / "server" / "web"
MOST = 150_000
SCRIPTS = sorted(WEB.glob("*.js"))
VOID = {"meta", "link", "br", "input"}


class Parsed(HTMLParser):
    """Elements with their attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.open: list[list[str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        texts: list[str] = []
        self.elements.append((tag, {name: value or "" for name, value in attributes}, texts))
        if tag not in VOID:
            self.open.append(texts)

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        for texts in self.open:
            texts.append(data)


@pytest.fixture
def page(live: Live) -> Parsed:
    return Parsed(live.http.get("/", headers=BROWSER).text)


def test_it_is_small_and_fetches_nothing_from_elsewhere() -> None:
    files = sorted(WEB.iterdir())
    assert sum(file.stat().st_size for file in files) <= MOST
    for file in files:
        text = file.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")  # a name, not an address
        assert not re.findall(r"(?:https?:)?//[a-z0-9.-]+\.[a-z]{2,}", text), file.name
        assert "@import" not in text
        for address in re.findall(r"""(?:\bfrom\s+|import\(|url\()["']([^"']+)""", text):
            assert (WEB / address.removeprefix("/web/")).is_file(), address


def test_nothing_of_it_is_inline_and_no_text_becomes_markup(page: Parsed) -> None:
    for tag, attributes, texts in page.elements:
        assert tag != "style"
        assert not {name for name in attributes if name == "style" or name.startswith("on")}, (tag, attributes)
        if tag == "script":
            assert attributes["src"].startswith("/web/")
            assert not "".join(texts).strip()
    for script in SCRIPTS:
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|DOMParser|srcdoc|\.innerText",
            script.read_text("utf-8"),
        ), script.name


def test_its_policy_allows_nothing_but_its_own_files(live: Live, page: Parsed) -> None:
    response = live.http.get("/", headers=BROWSER)
    policy = dict(part.strip().partition(" ")[::2] for part in response.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert response.headers["cache-control"] == "no-store"
    parts = [
        one[name] for _, one, _ in page.elements for name in ("src", "href") if one.get(name, "").startswith("/web/")
    ]
    imported = {
        address for script in SCRIPTS for address in re.findall(r'from "(/web/[^"]+)"', script.read_text("utf-8"))
    }
    for path in {*parts, *imported}:
        part = live.http.get(path)
        assert part.status_code == 200, path
        assert part.headers["content-security-policy"] == response.headers["content-security-policy"]
        assert part.headers["x-content-type-options"] == "nosniff"
        kind = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}[Path(path).suffix]
        assert part.headers["content-type"].startswith(kind)
        again = live.http.get(path, headers={"If-None-Match": part.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert {Path(path).name for path in {*parts, *imported}} == {
        file.name for file in WEB.iterdir() if file.suffix != ".html"
    }


@pytest.mark.parametrize(
    "path", ["/web", "/web/", "/web/index.html", "/web/none.js", "/web/../cli.py", "/web/%2e%2e/cli.py"]
)
def test_there_is_nothing_else_beside_them(live: Live, path: str) -> None:
    assert live.http.get(path).status_code == 404


def test_every_control_has_a_name_and_every_reference_leads_somewhere(page: Parsed) -> None:
    ids = [attributes["id"] for _, attributes, _ in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes["for"] for tag, attributes, _ in page.elements if tag == "label"}
    for tag, attributes, texts in page.elements:
        for name in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids), (tag, name)
        if tag == "button":
            assert "".join(texts).strip() or attributes.get("aria-label"), attributes
            assert attributes.get("type") in ("button", "submit"), attributes
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled, attributes
        if tag in ("dialog", "nav", "aside"):
            assert attributes.get("aria-label") or attributes.get("aria-labelledby"), attributes
    for script in SCRIPTS:
        for name in re.findall(r'\$\("([\w-]+)"\)', script.read_text("utf-8")):
            assert name in ids or name.startswith("set-"), (script.name, name)


def test_with_keys_a_stranger_gets_the_page_and_nothing_it_shows(start: Start, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret-key:team\n")
    live = start(server={"api_keys_file": str(keys)})
    assert live.http.get("/web/page.js").status_code == 200
    for path in ("/v1/models", "/v1/atlas/config", "/v1/atlas/status", "/props"):
        assert live.http.get(path).status_code == 401


# --- colours ----------------------------------------------------------------------------------------------------------
def _colours() -> dict[str, tuple[str, str]]:
    """The variables of the style sheet, light and dark."""
    text = (WEB / "page.css").read_text("utf-8")
    return {
        name: (light, dark) for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", text)
    }


def _luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


GROUNDS = ("ground", "raised", "sunken")
PAIRS = [
    *((text, ground) for text in ("text", "soft", "accent", "good") for ground in GROUNDS),
    *(("text", f"gate-{number}") for number in range(1, 6)),
    ("on-accent", "accent"),
    ("fault", "fault-ground"),
    ("fault", "ground"),
    ("text", "fault-ground"),
    ("ground", "text"),
]


def test_contrast_is_what_wcag_computes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("mode", [0, 1], ids=["light", "dark"])
def test_every_text_stands_out_from_its_ground(mode: int) -> None:
    colours = _colours()
    low = {pair: contrast(colours[pair[0]][mode], colours[pair[1]][mode]) for pair in PAIRS}
    assert {pair: round(value, 2) for pair, value in low.items() if value < 4.5} == {}
    # what shows where a control ends, or how full something is
    for one, other in (("edge", "raised"), ("edge", "ground"), ("accent", "line")):
        assert contrast(colours[one][mode], colours[other][mode]) >= 3


def test_no_colour_is_written_beside_the_variables() -> None:
    text = (WEB / "page.css").read_text("utf-8")
    rules = text[text.index("*, ::before") :]
    assert not re.findall(r"#[0-9a-fA-F]{3,8}\b(?=[;\s,)])", rules)
    used = set(re.findall(r"var\(--([\w-]+)\)", rules))
    assert used == {*_colours(), "sans", "mono"}


def test_gates_have_colours_that_differ() -> None:
    colours = _colours()
    for mode in (0, 1):
        steps = [colours["ground"][mode], *(colours[f"gate-{number}"][mode] for number in range(1, 6))]
        shades = [_luminance(one) for one in steps]
        assert shades == sorted(shades, reverse=mode == 0)
        assert all(contrast(one, other) > 1.03 for one, other in itertools.pairwise(steps))
