"""Draws the diagrams of README.md and DESIGN.md as SVG: the idea, a request's way, a memory's way (`make diagrams`).

python tools/draw_diagrams.py [--folder docs/images]
"""

from __future__ import annotations

import argparse
import html
from dataclasses import dataclass, field
from pathlib import Path

_FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
_FILLS = {"plain": "#ffffff", "blue": "#dbe9f6", "amber": "#fdeecb", "green": "#dff0dc", "grey": "#eceff1"}


@dataclass
class Drawing:
    """Boxes and arrows on a white ground."""

    title: str
    width: int
    height: int
    parts: list[str] = field(default_factory=list)

    def box(self, x: int, y: int, width: int, height: int, text: str, fill: str = "plain", note: str = "") -> None:
        """A box with a name, and below it, smaller, the module that does it or what it holds."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{_FILLS[fill]}" stroke="#37474f"/>'
        )
        lines, notes = text.split("\n"), note.split("\n") if note else []
        top = y + (height - 17 * len(lines) - 14 * len(notes)) / 2 + 13
        for index, line in enumerate(lines):
            self.text(x + width / 2, top + 17 * index, line, weight="600")
        for index, line in enumerate(notes):
            self.text(x + width / 2, top + 17 * len(lines) + 14 * index - 2, line, size=11, colour="#455a64")

    def text(
        self,
        x: float,
        y: float,
        line: str,
        *,
        size: int = 13,
        colour: str = "#102027",
        weight: str = "400",
        anchor: str = "middle",
    ) -> None:
        """One line of text."""
        self.parts.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" fill="{colour}" '
            f'text-anchor="{anchor}">{html.escape(line)}</text>'
        )

    def arrow(self, *points: tuple[int, int], label: str = "", at: tuple[int, int] | None = None) -> None:
        """A line through some points with a head at the last, and words beside it."""
        path = " ".join(f"{x},{y}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="#37474f" stroke-width="1.5" marker-end="url(#head)"/>'
        )
        if label:
            (x, y) = at or ((points[0][0] + points[1][0]) // 2, (points[0][1] + points[1][1]) // 2 - 6)
            for index, line in enumerate(label.split("\n")):
                self.text(x, y + 14 * index, line, size=11, colour="#455a64")

    def frame(self, x: int, y: int, width: int, height: int, name: str) -> None:
        """A dashed frame around what belongs together, with its name in the corner."""
        self.parts.append(
            f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" fill="none" stroke="#90a4ae" '
            'stroke-dasharray="5 4"/>'
        )
        self.text(x + 10, y + 17, name, size=12, colour="#607d8b", anchor="start")

    def svg(self) -> str:
        """The drawing as a file's text."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" role="img" '
            f'font-family="{_FONT}">\n<title>{html.escape(self.title)}</title>\n'
            '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="#37474f"/></marker></defs>\n'
            f'<rect width="{self.width}" height="{self.height}" rx="10" fill="#ffffff"/>\n'
        )
        return head + "\n".join(self.parts) + "\n</svg>\n"


def idea() -> Drawing:
    """What leaves the window is written into a memory of fixed size, which takes part in the next token."""
    draw = Drawing("What leaves the attention window is written into a memory of fixed size", 900, 300)
    draw.text(24, 34, "the text of a session, oldest token first", anchor="start", size=12, colour="#607d8b")
    for index in range(6):
        draw.box(24 + 56 * index, 46, 50, 36, "…" if index == 0 else "", "grey")
    draw.frame(366, 24, 294, 74, "attention window, 512 tokens")
    for index in range(4):
        draw.box(376 + 70 * index, 50, 62, 36, "page", "blue")
    draw.box(690, 46, 90, 40, "next token", "plain")
    draw.arrow((190, 86), (190, 150), label="a page that leaves the window\nis written, once", at=(96, 112))
    draw.box(110, 154, 230, 62, "session memory", "amber", "fixed size, whatever the length")
    draw.box(406, 154, 210, 62, "transformer", "blue", "exact attention over the window")
    draw.box(690, 154, 186, 62, "mixture", "green", "(1 − g)·p_model + g·p_memory")
    draw.arrow((511, 98), (511, 152))
    draw.arrow((616, 185), (688, 185), label="p_model", at=(652, 178))
    draw.arrow(
        (225, 216),
        (225, 262),
        (783, 262),
        (783, 218),
        label="p_memory: tokens that followed this state before",
        at=(504, 255),
    )
    draw.arrow((735, 152), (735, 88))
    draw.arrow((110, 185), (62, 185), (62, 228))
    draw.box(24, 230, 150, 46, "disk", "grey", "journal, snapshot")
    return draw


def request() -> Drawing:
    """From a request to bytes."""
    draw = Drawing("The way of a request", 900, 470)
    draw.frame(14, 12, 872, 132, "server/ — event loop")
    draw.box(30, 40, 150, 84, "middleware", "plain", "host, key, limits,\nbody size\nmiddleware/asgi.py")
    draw.box(212, 40, 150, 84, "controller", "plain", "body to struct\ncontrollers/openai.py")
    draw.box(394, 40, 150, 84, "request", "plain", "tokenize, sampling,\nmemory settings\nservices/inference.py")
    draw.box(576, 40, 150, 84, "admission", "plain", "a slot, fair by key\nadmission.py")
    draw.arrow((180, 82), (210, 82))
    draw.arrow((362, 82), (392, 82))
    draw.arrow((544, 82), (574, 82))
    draw.frame(14, 160, 872, 142, "atlas_jax/engine/ — engine thread")
    draw.box(576, 190, 150, 92, "scheduler", "blue", "admits, resumes the\nsession, picks the\nnext step\nscheduler/")
    draw.box(394, 190, 150, 92, "prefill", "blue", "chunks of 32 and 128,\nafter the longest\ncached prefix")
    draw.box(212, 190, 150, 92, "decode batch", "blue", "rows 1, 2, 4, 8, …\n3 tokens with drafts")
    draw.box(30, 190, 150, 92, "detokenizer", "plain", "whole characters,\nstop strings")
    draw.arrow((651, 124), (651, 188), label="one engine request per sequence", at=(752, 156))
    draw.arrow((576, 236), (546, 236))
    draw.arrow((394, 236), (364, 236))
    draw.arrow((212, 236), (182, 236))
    draw.arrow((105, 190), (105, 126), label="event bridge, SSE", at=(160, 156))
    draw.box(750, 190, 120, 92, "sessions", "amber", "history, tiers,\njournal\nsessions/")
    draw.arrow((750, 236), (728, 236))
    draw.frame(14, 318, 872, 138, "one compiled step")
    names = (
        ("embed", "", "blue"),
        ("layer groups", "qkv, rope, cache,\nattention, MLP", "blue"),
        ("memory keys", "states of the\ntapped layers", "amber"),
        ("head", "logits", "blue"),
        ("memory read", "gate, mixture", "amber"),
        ("sampler", "draw, check drafts,\nn-gram drafter", "green"),
    )
    for index, (name, note, fill) in enumerate(names):
        x = 30 + 143 * index
        draw.box(x, 348, 125, 88, name, fill, note)
        if index:
            draw.arrow((x - 18, 392), (x - 2, 392))
    draw.arrow((287, 282), (287, 346))
    return draw


def memory() -> Drawing:
    """What a memory does while a session reads and writes."""
    draw = Drawing("The way of a memory", 900, 420)
    draw.frame(14, 12, 872, 118, "every token")
    draw.box(30, 40, 160, 74, "hidden state", "blue", "after the tapped layer")
    draw.box(232, 40, 180, 74, "key", "amber", "96 of the state, 96 of a\nsketch of the words before")
    draw.box(454, 40, 180, 74, "features φ", "amber", "9216 products, degree 2")
    draw.box(676, 40, 190, 74, "value", "amber", "±1 code of the token\nthat came next")
    draw.arrow((190, 77), (230, 77))
    draw.arrow((412, 77), (452, 77))
    draw.frame(14, 146, 872, 118, "when a page leaves the window")
    draw.box(30, 176, 160, 72, "page schedule", "plain", "follows from the\nposition alone")
    draw.box(232, 176, 180, 72, "absorb", "amber", "Omega objective over the\nlast 512 tokens that left")
    draw.box(454, 176, 180, 72, "solve", "amber", "exact, gradient\nor Muon")
    draw.box(676, 176, 190, 72, "M, 9216 × 256", "amber", "float32, and an int8 copy")
    draw.arrow((190, 212), (230, 212))
    draw.arrow((412, 212), (452, 212))
    draw.arrow((634, 212), (674, 212))
    draw.arrow((544, 114), (544, 174))
    draw.arrow((771, 114), (771, 174))
    draw.frame(14, 280, 872, 124, "every generated token")
    draw.box(676, 310, 190, 76, "read", "amber", "M φ(k) · code(v) for\ntokens seen")
    draw.box(454, 310, 180, 76, "gate", "green", "score, lead, entropy,\nblend ratio")
    draw.box(232, 310, 180, 76, "mixture", "green", "(1 − g)·p_model\n+ g·p_memory")
    draw.box(30, 310, 160, 76, "sampler", "plain", "")
    draw.arrow((771, 248), (771, 308))
    draw.arrow((676, 348), (636, 348))
    draw.arrow((454, 348), (414, 348))
    draw.arrow((232, 348), (192, 348))
    return draw


DRAWINGS = {"idea.svg": idea, "request.svg": request, "memory.svg": memory}


def main() -> None:
    """Writes all drawings."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in DRAWINGS.items():
        (folder / name).write_text(draw().svg(), "utf-8")


if __name__ == "__main__":
    main()
