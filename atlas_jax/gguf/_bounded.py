"""Operations whose result can be far larger than their operands, checked before they run."""

from __future__ import annotations

import html
import json
import math
import operator
import pprint
import re
import string
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any

from atlas_jax.gguf._budget import ELEMENT, MAX_INTEGER_BITS, Own, TemplateError, current, is_own, made_of, text

_MAX_WIDTH = 10_000
# Characters of the longest text that is wrapped or laid out, which takes microseconds for each.
_MAX_LAID_OUT = 100_000
_PERCENT = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def _width(digits: str) -> int:
    if len(digits) > 5 or int(digits) > _MAX_WIDTH:
        raise TemplateError(f"chat template formats to a width of more than {_MAX_WIDTH}")
    return int(digits)


def concat(*values: Any) -> str:
    """The texts of values; where neighbours are the template's own, the control tokens they make together are marked."""
    texts = [text(value) for value in values]
    budget = current()
    budget.tick()
    budget.spend(sum(map(len, texts)))
    joined = "".join(texts)
    if budget.mark is None or len(values) < 2:
        return joined
    if all(map(is_own, values)):
        return Own(budget.mark(joined))
    runs = groupby(zip(values, texts, strict=True), key=lambda pair: is_own(pair[0]))
    parts = ((own, "".join(one for _, one in run)) for own, run in runs)
    return "".join(budget.mark(one) if own else one for own, one in parts)


def add(left: Any, right: Any) -> Any:
    if isinstance(left, (str, list, tuple)) and isinstance(right, (str, list, tuple)):
        current().check((len(left) + len(right)) * (1 if isinstance(left, str) else ELEMENT))
    return made_of(operator.add(left, right), (left, right))


def multiply(left: Any, right: Any) -> Any:
    for value, count in ((left, right), (right, left)):
        if isinstance(value, (str, list, tuple)) and isinstance(count, int):
            current().check(len(value) * max(count, 0) * (1 if isinstance(value, str) else ELEMENT))
    return operator.mul(left, right)


def power(left: Any, right: Any) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INTEGER_BITS:
        raise TemplateError(f"chat template made an integer of more than {MAX_INTEGER_BITS} bits")
    return operator.pow(left, right)


def modulo(left: Any, right: Any) -> Any:
    return percent_format(left, right) if isinstance(left, str) else operator.mod(left, right)


def percent_format(template: str, values: Any) -> str:
    """`template % values`, without `*` widths."""
    fields = size = 0
    for match in _PERCENT.finditer(template):
        current().tick()
        fields += 1
        for digits in match.groups():
            if digits == "*":
                raise TemplateError("chat template formats to a width given as an argument")
            size += _width(digits) if digits else 0
    arguments = values.values() if isinstance(values, dict) else values if isinstance(values, tuple) else (values,)
    longest = max((len(text(value)) for value in arguments), default=0)
    current().check(len(template) + size + fields * longest)
    result: str = template % values
    return str(made_of(result, (template, *arguments)))


class BoundedFormatter(string.Formatter):
    """`str.format` whose fields reach only what a template may reach, with bounded widths."""

    def __init__(self, getattribute: Callable[[Any, str], Any], getitem: Callable[[Any, Any], Any]) -> None:
        self._getattribute = getattribute
        self._getitem = getitem

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        first, *rest = re.split(r"\.|\[", field_name)
        value = self.get_value(int(first) if first.isdigit() else first, args, kwargs)
        for step in rest:
            if step.endswith("]"):
                key = step[:-1]
                value = self._getitem(value, int(key) if key.isdigit() else key)
            else:
                value = self._getattribute(value, step)
        return value, first

    def format_field(self, value: Any, format_spec: str) -> str:
        for digits in re.findall(r"\d+", format_spec):
            _width(digits)
        budget = current()
        budget.tick()
        result = format(value, format_spec) if isinstance(value, (str, int, float)) else text(value)
        budget.spend(len(result))
        return result


def join(separator: Any, values: Iterable[Any]) -> str:
    budget = current()
    glue, size, texts = text(separator), 0, []
    own = is_own(separator)
    for value in values:
        own = own and is_own(value)
        texts.append(text(value))
        size += len(texts[-1]) + len(glue)
        budget.check(size - len(glue))
        budget.tick()
    joined = glue.join(texts)
    return Own(budget.mark(joined)) if own and budget.mark is not None else joined


def replace(value: Any, old: Any, new: Any, count: Any = None) -> str:
    subject, old, new = text(value), text(old), text(new)
    limit = -1 if count is None else int(count)
    times = subject.count(old) if old else len(subject) + 1
    times = min(times, limit) if limit >= 0 else times
    current().check(len(subject) + times * (len(new) - len(old)))
    return subject.replace(old, new, limit)


def padded(name: str) -> Callable[..., str]:
    """`ljust`, `rjust`, `center` or `zfill` with a bounded width."""

    def pad(value: Any, width: int = 80, *fill: str) -> str:
        current().check(width)
        return str(getattr(text(value), name)(width, *fill))

    return pad


def split(name: str) -> Callable[..., list[str]]:
    """`split` or `rsplit` with a bounded number of parts."""

    def cut(value: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
        most = current().max_items
        parts: list[str] = getattr(value, name)(sep, most if maxsplit < 0 else min(maxsplit, most))
        if len(parts) > most:
            raise TemplateError(f"chat template made a list of more than {most} elements")
        return parts

    return cut


def splitlines(value: str, keepends: bool = False) -> list[str]:
    check_items(sum(map(value.count, _LINE_ENDS)))
    return value.splitlines(keepends)


def check_items(count: int) -> None:
    """Refuses a list of too many elements before it is made."""
    if count > current().max_items:
        raise TemplateError(f"chat template made a list of more than {current().max_items} elements")


def check_indent(value: Any, width: Any = 4, *_: Any, **__: Any) -> None:
    """Refuses `|indent` if every line would grow too much."""
    subject = text(value)
    lines = 1 + sum(map(subject.count, _LINE_ENDS))
    check_items(lines)
    current().check(len(subject) + lines * (width if isinstance(width, int) else len(text(width))))


def slice_of(value: Any, start: Any, stop: Any, step: Any) -> Any:
    current().tick()
    return current().admit(value[start:stop:step])


def total(values: Iterable[Any], start: Any = 0) -> Any:
    """`sum` of numbers; of lists it would be quadratic."""
    for value in values:
        current().tick()
        if not isinstance(value, (int, float)):
            raise TemplateError(f"chat template sums up a {type(value).__name__}")
        start = start + value
    return start


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as `transformers` writes it in templates: characters as they are."""
    if indent is not None and not (isinstance(indent, int) and 0 <= indent <= 16):
        raise TemplateError("chat template writes JSON with an indent outside 0 to 16")
    size, depth = current().measure(value)
    between = sum(map(len, separators or ())) + (indent or 0) * depth
    current().check(size + size // ELEMENT * between)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def expand_tabs(value: str, tabsize: int = 8) -> str:
    """`str.expandtabs` with a bounded width."""
    current().check(len(value) + value.count("\t") * max(_width(str(abs(tabsize))), 0))
    return value.expandtabs(tabsize)


def strip_tags(value: Any) -> str:
    """A text without comments and tags, its blanks made one and its entities read, as Jinja's filter of that name."""
    subject = _between(_between(text(value), "<!--", "-->"), "<", ">")
    check_items(subject.count(" "))
    return html.unescape(" ".join(subject.split()))


def _between(subject: str, start: str, end: str) -> str:
    """A text without what lies between two marks, themselves included; one look at each character."""
    kept, at = [], 0
    while (begin := subject.find(start, at)) >= 0 and (stop := subject.find(end, begin)) >= 0:
        current().tick()
        kept.append(subject[at:begin])
        at = stop + len(end)
    return "".join([*kept, subject[at:]])


def wrap_words(
    value: Any,
    width: int = 79,
    break_long_words: bool = True,
    wrapstring: str | None = None,
    break_on_hyphens: bool = True,
) -> str:
    """Jinja's `wordwrap` of a text of bounded length."""
    subject, glue = _laid_out(text(value)), "\n" if wrapstring is None else text(wrapstring)
    current().check(len(subject) * (1 + len(glue)))
    wrapper = textwrap.TextWrapper(
        width=_width(str(width)),
        expand_tabs=False,
        replace_whitespace=False,
        break_long_words=break_long_words,
        break_on_hyphens=break_on_hyphens,
    )
    return glue.join(glue.join(wrapper.wrap(line)) for line in subject.splitlines())


def pretty(value: Any) -> str:
    """Python's own layout of a value that is JSON."""
    if not isinstance(value, str | int | float | list | tuple | dict | None):
        return text(value)
    size, depth = current().measure(value)
    if size * (depth + 1) > _MAX_LAID_OUT:
        raise TemplateError(f"chat template lays out a value of more than {_MAX_LAID_OUT} characters")
    return pprint.pformat(value)


def file_size(value: Any, binary: bool = False) -> str:
    """A number of bytes in the unit that suits it, as Jinja's `filesizeformat`."""
    size, base = float(value), 1024 if binary else 1000
    if size < base:
        return "1 Byte" if size == 1 else f"{int(size)} Bytes"
    units = ("KiB", "MiB", "GiB", "TiB", "PiB") if binary else ("kB", "MB", "GB", "TB", "PB")
    power = min(int(math.log(size, base)), len(units))
    return f"{size / base**power:.1f} {units[power - 1]}"


def _laid_out(subject: str) -> str:
    if len(subject) > _MAX_LAID_OUT:
        raise TemplateError(f"chat template lays out a text of more than {_MAX_LAID_OUT} characters")
    return subject
