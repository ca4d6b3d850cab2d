"""What is done to a template between parsing and compiling.

Jinja's sandbox asks its environment about operators, calls, filters and attributes. Loops, concatenation, comparisons,
slices, literals and plain text it compiles to Python of their own; here they are sent through filters of `_sandbox`,
so that nothing in a template runs beside the budget.

For rendering to tokens, control tokens in the template's own text become private characters (marks). What the messages
say can then never be taken for a control token: it holds no mark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeGuard, cast

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from atlas_jax.gguf._budget import TemplateError

_FORBIDDEN = (
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.EvalContextModifier,
)
_ARGUMENTS = ("args", "kwargs", "dyn_args", "dyn_kwargs")
# Where a text is looked for in a value rather than put out: left as it is written.
_SEARCHING_METHODS = frozenset(
    {"count", "endswith", "find", "index", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind"}
    | {"rindex", "rpartition", "rsplit", "rstrip", "split", "startswith", "strip", "get"}
)
# Of these the first argument is looked for, the second put out.
_PUTTING = frozenset({"get", "replace"})
_SEARCHING_FILTERS = frozenset(
    {"groupby", "map", "reject", "rejectattr", "replace", "select", "selectattr", "sort", "trim", "unique"}
)


class Marks:
    """Replaces control tokens in a template's text.

    Attributes:
      chars: token text → the character that stands for it.
      replace: puts the characters in place of the tokens in a text.
    """

    def __init__(self, chars: Mapping[str, str], replace: Callable[[str], str]) -> None:
        self.chars = chars
        self.replace = replace


def transform(template: nodes.Template, marks: Marks | None = None) -> nodes.Template:
    """Puts a parsed template under the budget and, with `marks`, replaces the control tokens of its own text.

    Raises:
      TemplateError: the template uses a statement that is not allowed.
    """
    result: nodes.Template = _Transformer(marks).visit(template)
    return result


def _guard(name: str, node: nodes.Expr, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, f" {name}", list(args), [], None, None, lineno=node.lineno)


def _const(value: Any, lineno: int) -> nodes.Const:
    return nodes.Const(value, lineno=lineno)


def _is_text(node: nodes.Node) -> TypeGuard[nodes.Const]:
    return isinstance(node, nodes.Const) and isinstance(node.value, str)


def _joins_text(node: nodes.Expr) -> bool:
    """Whether an expression can only be a join of texts."""
    if isinstance(node, nodes.Add):
        return any(_is_text(side) or _joins_text(side) for side in (node.left, node.right))
    return isinstance(node, nodes.Concat)


def _joined(node: nodes.Expr) -> list[nodes.Expr]:
    """The texts that an expression joins, or the expression itself."""
    if not _joins_text(node):
        return [node]
    if isinstance(node, nodes.Concat):
        return [part for child in node.nodes for part in _joined(child)]
    sides = (cast(nodes.Add, node).left, cast(nodes.Add, node).right)
    return [
        part
        for side in sides
        for part in (_joined(side) if _is_text(side) or _joins_text(side) else [_guard("text", side)])
    ]


class _Transformer(NodeTransformer):
    def __init__(self, marks: Marks | None) -> None:
        self._marks = marks
        # Inside what is compared or looked for, where texts stay as they are written.
        self._searching = False

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        if isinstance(node, _FORBIDDEN):
            raise TemplateError(f"chat template line {node.lineno}: {type(node).__name__} is not allowed")
        return super().generic_visit(node, *args, **kwargs)

    def _visit_all(self, parts: Iterable[Any], *, searching: bool = False) -> list[Any]:
        outer = self._searching
        self._searching = outer or searching
        try:
            return [self.visit(part) for part in parts]
        finally:
            self._searching = outer

    # --- text ---------------------------------------------------------------------------------------------------
    def visit_Const(self, node: nodes.Const) -> nodes.Node:
        if self._marks is None or self._searching or not _is_text(node):
            return node
        return _guard("own", _const(self._marks.replace(node.value), node.lineno))

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        # Constants pass through the environment's `finalize`, which counts them; template data would not.
        parts = [
            _const(part.data, part.lineno) if isinstance(part, nodes.TemplateData) else part for part in node.nodes
        ]
        if self._marks is not None:
            # Together, for a control token may be built of what stands side by side.
            parts = [self._together(parts)]
            return nodes.Output(parts, lineno=node.lineno)
        return nodes.Output(self._visit_all(parts), lineno=node.lineno)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return self._together(node.nodes)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:
        return self._together([node]) if self._marks is not None and _joins_text(node) else self.generic_visit(node)

    def _together(self, parts: Sequence[nodes.Expr]) -> nodes.Expr:
        """What parts make side by side; those that join texts themselves are taken apart first."""
        if self._marks is not None:
            parts = [*chain.from_iterable(map(_joined, parts))]
        first, *rest = self._visit_all(parts)
        return _guard("concat", first, *rest)

    # --- what is compared or looked for -------------------------------------------------------------------------
    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        first, *rest = self._visit_all([node.expr, *(operand.expr for operand in node.ops)], searching=True)
        operands = [
            nodes.Operand(old.op, _guard("tick", new), lineno=old.lineno)
            for old, new in zip(node.ops, rest, strict=True)
        ]
        return nodes.Compare(_guard("tick", first), operands, lineno=node.lineno)

    def visit_Test(self, node: nodes.Test) -> nodes.Node:
        return self._visit_parts(node, ("node", "args", "kwargs"), searching=True)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:
        self._visit_parts(node, ("node",))
        if node.name.startswith(" "):
            return node
        return self._visit_arguments(node, node.name if node.name in _SEARCHING_FILTERS else None)

    def visit_Call(self, node: nodes.Call) -> nodes.Node:
        method = node.node.attr if isinstance(node.node, nodes.Getattr) else None
        self._visit_parts(node, ("node",))
        return self._visit_arguments(node, method if method in _SEARCHING_METHODS else None)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self._visit_parts(node, ("node",))
        self._visit_parts(node, ("arg",), searching=True)
        if not isinstance(node.arg, nodes.Slice):
            return node
        bounds = (node.arg.start, node.arg.stop, node.arg.step)
        return _guard("slice", node.node, *(bound or _const(None, node.lineno) for bound in bounds))

    def _visit_arguments(self, node: Any, searching: str | None) -> nodes.Expr:
        """Of a call or a filter, which looks for some of them if its name is given."""
        if searching in _PUTTING and len(node.args) > 1:
            first, *rest = node.args
            node.args = [*self._visit_all([first], searching=True), *self._visit_all(rest)]
            self._visit_parts(node, _ARGUMENTS[1:])
        else:
            self._visit_parts(node, _ARGUMENTS, searching=searching is not None)
        if self._marks is not None and searching is not None:
            node.args = [_guard("own", one) if _is_text(one) else one for one in node.args]
        return cast(nodes.Expr, node)

    def _visit_parts(self, node: nodes.Expr, fields: Iterable[str], *, searching: bool = False) -> nodes.Expr:
        for field in fields:
            value = getattr(node, field)
            if isinstance(value, list):
                setattr(node, field, self._visit_all(value, searching=searching))
            elif value is not None:
                setattr(node, field, self._visit_all([value], searching=searching)[0])
        return node

    # --- values and loops ---------------------------------------------------------------------------------------
    def visit_List(self, node: nodes.List) -> nodes.Node:
        return _guard("container", cast(nodes.Expr, self.generic_visit(node)))

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        visited = cast(nodes.Expr, self.generic_visit(node))
        return _guard("container", visited) if node.ctx == "load" else visited

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        keys = self._visit_all((pair.key for pair in node.items), searching=True)
        values = self._visit_all(pair.value for pair in node.items)
        pairs = [nodes.Pair(key, value, lineno=node.lineno) for key, value in zip(keys, values, strict=True)]
        return _guard("container", nodes.Dict(pairs, lineno=node.lineno))

    def visit_Assign(self, node: nodes.Assign) -> nodes.Node:
        self.generic_visit(node)
        if isinstance(node.target, nodes.NSRef) or node.target.find(nodes.NSRef) is not None:
            node.node = _guard("member", cast(nodes.Expr, node.node))
        return node

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        tick = _guard("tick", _const(True, node.lineno))
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if node.test is not None:
            node.test = nodes.And(tick, node.test, lineno=node.lineno)
        return node
