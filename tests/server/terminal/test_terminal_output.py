"""What is shown of texts that strangers wrote, and of sizes and times."""

from __future__ import annotations

import io
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from server.terminal import output
from server.terminal.line_input import clean


@settings(max_examples=50)
@given(st.text(max_size=40))
def test_nothing_that_is_shown_controls_a_terminal(text: str) -> None:
    shown = output.safe(text)
    assert all(unicodedata.category(one) != "Cc" or one in "\n\t" for one in shown)
    assert not set("\u202a\u202e\u2066\u2069\u200f") & set(shown)
    assert "\n" not in output.safe(text, lines=False)
    shown.encode("utf-8")


@settings(max_examples=30)
@given(st.text(st.characters(categories=("L", "N", "P", "S", "M"))))
def test_letters_of_every_script_are_shown_as_they_are(text: str) -> None:
    assert output.safe(text) == text


@settings(max_examples=30)
@given(st.binary(max_size=40))
def test_what_a_terminal_gives_becomes_unicode(data: bytes) -> None:
    assert clean(data.decode("utf-8", "surrogateescape")) == data.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (98_400_000, "98.4 MB"), (7.1e12, "7.1 TB")]
)
def test_sizes(count: int, shown: str) -> None:
    assert output.size(count) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(5, "5 s"), (90, "2 min"), (7200, "2 h"), (200_000, "2 d"), (-9, "0 s")]
)
def test_ages(seconds: float, shown: str) -> None:
    assert output.age(1000.0, 1000.0 + seconds) == shown


@pytest.mark.parametrize("width", [12, 40, 200])
def test_a_table_of_any_names_fits_any_terminal(width: int) -> None:
    names = ["плов 🍲" * 9, "名前" * 40, "\x1b[2Jevil", "[red]markup[/red]", "a" * 300]
    file = io.StringIO()
    console = Console(file=file, width=width, markup=False, force_terminal=False)
    console.print(output.table([("session", False), ("bytes", True)], ((name, "16.1 MB") for name in names)))
    lines = file.getvalue().splitlines()
    assert "\x1b" not in file.getvalue()
    assert len(lines) > len(names)
    from rich.cells import cell_len

    assert all(cell_len(line) <= width for line in lines)
