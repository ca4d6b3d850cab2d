"""Writes examples/atlas-config.json, every setting at its default, examples/atlas-config.md, what each one does, and the
table of the `atlas` object in docs/README-atlas.md.

python tools/write_settings.py [--folder examples]
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import msgspec

from server.config.settings import Settings
from server.config.sources import Option, options
from server.schemas.atlas import AtlasDefaults, AtlasOptions

_DOCUMENT = Path(__file__).parents[1] / "docs" / "README-atlas.md"
_TABLE = ("<!-- written by make config -->", "<!-- end -->")
_MODEL = "data/models/SmolLM2-135M-Instruct.Q4_1.gguf"
_INTRODUCTION = """# Every setting

`atlas-config.json` is a complete configuration file: every setting at its default, with the default model's path for
`server.model`, which has none. Copy it, delete what you do not change, and start with it:

```
atlas-jax serve --config examples/atlas-config.json
```

A setting comes from the default, the file, the environment and the flag, in this order. A key that is mistyped is an error
that names the nearest. `null` means what the text says. Switches are `--name` and `--no-name` on the command line.
Written by `make config`.
"""


def configuration() -> str:
    """The configuration file."""
    tree: dict[str, Any] = msgspec.to_builtins(Settings())
    tree["server"]["model"] = _MODEL
    return msgspec.json.format(msgspec.json.encode(tree), indent=2).decode() + "\n"


def reference() -> str:
    """What each setting does, a table for every section of the file."""
    sections: dict[str, list[Option]] = {}
    for option in options():
        sections.setdefault(".".join(option.path[:-1]), []).append(option)
    out = [_INTRODUCTION]
    for section, members in sections.items():
        out.append(f"\n## `{section}`\n\n| key | default | flag | environment | |\n|---|---|---|---|---|\n")
        for one in members:
            default = msgspec.json.encode(one.default).decode()
            text = re.sub(r"[|\[\]<]", r"\\\g<0>", one.help)  # a table's cell is Markdown, a help text is not
            out.append(f"| `{one.path[-1]}` | `{default}` | `{one.flag}` | `{one.env}` | {text} |\n")
    return "".join(out)


def memory_table() -> str:
    """The fields of the `atlas` object as a table."""
    defaults = msgspec.to_builtins(AtlasDefaults())
    _, components = msgspec.json.schema_components([AtlasOptions])
    out = ["| field | default | range | |\n|---|---|---|---|\n"]
    for name, shape in components["AtlasOptions"]["properties"].items():
        value = next((one for one in shape.get("anyOf", ()) if one.get("type") != "null"), shape)
        value = value | {key: shape[key] for key in ("description",) if key in shape}
        default = f"`{msgspec.json.encode(defaults[name]).decode()}`" if name in defaults else ""
        out.append(f"| `{name}` | {default} | {_range(value)} | {value['description']} |\n")
    return "".join(out)


def _range(value: dict[str, Any]) -> str:
    """What a JSON schema allows."""
    if "enum" in value:
        return ", ".join(f"`{one}`" for one in value["enum"])
    if value["type"] == "boolean":
        return "`true`, `false`"
    if value["type"] == "string":
        return f"{value['minLength']} to {value['maxLength']} characters"
    bounds = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return ", ".join(f"{word} {value[key]}" for key, word in bounds.items() if key in value).replace(", to", " to")


def with_table(text: str) -> str:
    """A document whose table of the `atlas` object is the schema's."""
    begin, end = _TABLE
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{memory_table()}{end}{after}"


def main() -> None:
    """Writes the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("examples"))
    folder: Path = parser.parse_args().folder
    (folder / "atlas-config.json").write_text(configuration(), "utf-8")
    (folder / "atlas-config.md").write_text(reference(), "utf-8")
    _DOCUMENT.write_text(with_table(_DOCUMENT.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
