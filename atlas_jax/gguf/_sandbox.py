"""A Jinja environment for templates that come with model files, which may be hostile.

On top of Jinja's immutable sandbox: values have only the attributes and methods listed here, filters are a list too,
every operator, call, filter and test goes through the rendering's `Budget`, and what could grow its operands is checked
before it runs (`_bounded`). `_template_ast` sends through here what Jinja does not.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any, NoReturn, cast

import markupsafe
from jinja2 import Undefined, nodes, pass_context, pass_environment
from jinja2.ext import Extension, LoopControlExtension
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Joiner, Namespace

from atlas_jax.gguf import _bounded
from atlas_jax.gguf._budget import Own, TemplateError, current, made_of, text

_MAX_RANGE = 100_000
# Jinja's own filters that are safe once their arguments and results are measured.
_JINJA_FILTERS = (
    *("abs", "batch", "capitalize", "count", "d", "default", "dictsort", "first", "float", "groupby", "indent"),
    *("int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject", "rejectattr", "reverse"),
    *("round", "select", "selectattr", "slice", "sort", "title", "trim", "truncate", "unique", "upper", "urlencode"),
    "wordcount",
)
# Those to which a string is a list of characters, or of words.
_ELEMENT_FILTERS = (
    *("batch", "groupby", "join", "list", "map", "max", "min", "reject", "rejectattr", "select", "selectattr"),
    *("slice", "sort", "sum", "title", "unique", "urlencode", "wordcount"),
)

_PLAIN_STRING_METHODS = (
    *("capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii", "isdecimal"),
    *("isdigit", "isidentifier", "islower", "isnumeric", "isprintable", "isspace", "istitle", "isupper", "lower"),
    *("lstrip", "partition", "removeprefix", "removesuffix", "rfind", "rindex", "rpartition", "rstrip", "startswith"),
    *("strip", "swapcase", "title", "upper"),
)


class _Method:
    """A method of a string, list or dict, bound to its value."""

    __slots__ = ("_function", "_value")

    def __init__(self, function: Callable[..., Any], value: Any) -> None:
        self._function = function
        self._value = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return current().admit(
            made_of(self._function(self._value, *args, **kwargs), (self._value, *args, *kwargs.values()))
        )


_METHODS: dict[type, dict[str, Callable[..., Any]]] = {
    str: {
        **{name: getattr(str, name) for name in _PLAIN_STRING_METHODS},
        **{name: _bounded.padded(name) for name in ("center", "ljust", "rjust", "zfill")},
        "expandtabs": _bounded.expand_tabs,
        "join": _bounded.join,
        "replace": _bounded.replace,
        "rsplit": _bounded.split("rsplit"),
        "split": _bounded.split("split"),
        "splitlines": _bounded.splitlines,
    },
    dict: {
        "copy": dict.copy,
        "get": dict.get,
        "items": lambda value: list(value.items()),
        "keys": lambda value: list(value),
        "values": lambda value: list(value.values()),
    },
    list: {"copy": list.copy, "count": list.count, "index": list.index},
    tuple: {"count": tuple.count, "index": tuple.index},
}
_RUNTIME_TYPES = (BlockReference, Cycler, Joiner, LoopContext, Macro, Namespace)


def _range(*args: int) -> range:
    result = range(*args)
    if len(result) > _MAX_RANGE:
        raise TemplateError(f"chat template made a range of more than {_MAX_RANGE} numbers")
    return result


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    result: dict[Any, Any] = current().admit(dict(*args, **kwargs))
    return result


def _namespace(*args: Any, **kwargs: Any) -> Namespace:
    return Namespace(_dict(*args, **kwargs))


def _raise_exception(message: Any = "") -> NoReturn:
    raise TemplateError(text(message)[:1000])


def _strftime_now(template: str) -> str:
    # C libraries take widths of any size between % and the letter.
    if len(template) > 100 or re.search(r"%[^A-Za-z%]*\d", template):
        raise TemplateError("chat template formats the time in an unusual way")
    return datetime.now().strftime(template)


_GLOBALS = {
    "cycler": Cycler,
    "dict": _dict,
    "joiner": Joiner,
    "namespace": _namespace,
    "raise_exception": _raise_exception,
    "range": _range,
    "strftime_now": _strftime_now,
}


class _GenerationTag(Extension):
    """`{% generation %}` marks what a model writes; for rendering it is nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """Where chat templates are compiled and run; values are strings, numbers, lists and dicts."""

    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=(LoopControlExtension, _GenerationTag),
            # Constants must not be computed while compiling, where no budget holds.
            optimized=False,
            finalize=_printed,
            cache_size=0,
        )
        self.binop_table.update({"+": _bounded.add, "*": _bounded.multiply, "**": _bounded.power, "%": _bounded.modulo})
        self._formatter = _bounded.BoundedFormatter(self.getattr, self.getitem)
        own_filters: dict[str, Callable[..., Any]] = {
            "attr": _attr,
            "center": _bounded.padded("center"),
            "e": _escape,
            "escape": _escape,
            "filesizeformat": _bounded.file_size,
            "forceescape": _escape,
            "format": lambda value, *args, **kwargs: _bounded.percent_format(text(value), kwargs or args),
            "join": _join,
            "pprint": _bounded.pretty,
            "replace": _bounded.replace,
            "safe": text,
            "string": text,
            "striptags": _bounded.strip_tags,
            "sum": _sum,
            "tojson": _bounded.to_json,
            "wordwrap": _bounded.wrap_words,
        }
        filters = {name: self.filters[name] for name in _JINJA_FILTERS} | own_filters
        self.filters = {name: _guarded(name, function) for name, function in filters.items()} | _INTERNAL_FILTERS
        self.tests = {name: _guarded_test(cast(Callable[..., Any], test)) for name, test in self.tests.items()}
        self.globals = dict(_GLOBALS)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        current().tick()
        return current().admit(self.binop_table[operator](left, right))

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        current().tick()
        if isinstance(obj, Undefined):
            obj()  # says what is undefined
        target = getattr(obj, "__self__", obj)
        known = isinstance(target, (_Method, *_RUNTIME_TYPES)) or any(obj is known for known in _GLOBALS.values())
        if not known:
            raise TemplateError(f"chat template calls a {type(obj).__name__}")
        return context.call(obj, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        found = self.attribute(obj, attribute)
        if found is not None:
            return found
        try:
            return obj[attribute]
        except (TypeError, LookupError, AttributeError):
            return self.undefined(obj=obj, name=attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        current().tick()
        try:
            return obj[argument]
        except (TypeError, LookupError, AttributeError):
            found = self.attribute(obj, argument) if isinstance(argument, str) else None
            return self.undefined(obj=obj, name=argument) if found is None else found

    def attribute(self, obj: Any, name: str) -> Any:
        """An attribute that templates may see, or None."""
        if isinstance(obj, str) and name == "format":
            return _Method(self._format, obj)
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                if name in methods:
                    return _Method(methods[name], obj)
                # Groups of `groupby` are tuples whose elements have names.
                return getattr(obj, name) if name in getattr(obj, "_fields", ()) else None
        if isinstance(obj, Undefined):
            obj()  # says what is undefined
        if isinstance(obj, _RUNTIME_TYPES) and self.is_safe_attribute(obj, name, None):
            return getattr(obj, name, None)
        return None

    def _format(self, template: str, /, *args: Any, **kwargs: Any) -> str:
        return self._formatter.vformat(template, args, kwargs)


@pass_context
def _printed(context: Context, value: Any) -> str:
    """What `{{ … }}` puts out; that it wants the context keeps Jinja from calling it while compiling."""
    return _bounded.concat(value)


def _escape(value: Any) -> str:
    return str(markupsafe.escape(text(value)))


@pass_environment
def _attr(environment: TemplateEnvironment, value: Any, name: Any) -> Any:
    """An attribute that templates may see; never an item."""
    found = environment.attribute(value, text(name))
    return environment.undefined(obj=value, name=text(name)) if found is None else found


@pass_environment
def _join(environment: TemplateEnvironment, values: Any, separator: Any = "", attribute: Any = None) -> str:
    return _bounded.join(separator, _of_attribute(environment, values, attribute))


@pass_environment
def _sum(environment: TemplateEnvironment, values: Any, attribute: Any = None, start: Any = 0) -> Any:
    return _bounded.total(_of_attribute(environment, values, attribute), start)


def _of_attribute(environment: TemplateEnvironment, values: Any, attribute: Any) -> Any:
    return values if attribute is None else map(make_attrgetter(environment, attribute), values)


def _guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter whose arguments and result are measured."""
    # Some of Jinja's filters take the context or the environment first.
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        current().tick()
        value, given = args[first], (*args[first + 1 :], *kwargs.values())
        if name in _ELEMENT_FILTERS and isinstance(value, str):
            _bounded.check_items(len(value))
        if name == "indent":
            _bounded.check_indent(value, *args[first + 1 :], **kwargs)
        elif name in ("batch", "slice", "round"):
            for number in given:
                if isinstance(number, int) and abs(number) > (100 if name == "round" else current().max_items):
                    raise TemplateError(f"chat template calls {name} with {number}")
        return made_of(current().admit(function(*args, **kwargs)), (value, *given))

    return guarded


def _guarded_test(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        current().tick()
        return function(*args, **kwargs)

    return guarded


# --- what `_template_ast` puts into templates, which cannot write a filter whose name begins with a space -------------
def _tick(value: Any) -> Any:
    current().tick()
    return value


def _container(value: Any) -> Any:
    return current().admit(value)


def _member(value: Any) -> Any:
    """A value that becomes an attribute of a namespace: namespaces in namespaces could grow without measure."""
    if isinstance(value, Namespace):
        raise TemplateError("chat template puts a namespace into a namespace")
    return value


def _text(value: Any) -> str:
    """An operand of `+` whose other side is a text."""
    if isinstance(value, Undefined):
        value()  # says what is undefined
    if not isinstance(value, str):
        raise TypeError(f'can only concatenate str (not "{type(value).__name__}") to str')
    return value


def _own(value: str) -> str:
    """A text that stands in the template."""
    return Own(value)


_INTERNAL_FILTERS: dict[str, Callable[..., Any]] = {
    " concat": _bounded.concat,
    " container": _container,
    " member": _member,
    " own": _own,
    " slice": _bounded.slice_of,
    " text": _text,
    " tick": _tick,
}
