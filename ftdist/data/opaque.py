"""Whether a chat template treats contents as opaque: puts them into its text, trimmed or not, and asks nothing of them.

Then its rendering of one conversation, with marks in place of the contents, tells the rendering of every conversation
with the same roles, and need not be repeated for each row. Decided from the template's syntax tree; what is not
understood counts as a question. Holds for messages of a role and a content that is not blank, and without tools.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jinja2 import nodes

# What an expression depends on: nothing but roles; contents, which it only joins to other text; messages.
_ROLES, _TEXT, _MESSAGE, _MESSAGES = range(4)
_TYPE_TESTS = {"string", "defined", "undefined", "none", "mapping", "iterable", "sequence", "number", "boolean"}


class _Asks(Exception):
    """The template depends on what a content says, or this reader does not understand it."""


def is_opaque(tree: nodes.Template) -> bool:
    """Whether no content decides anything in this template."""
    reader = _Reader()
    try:
        while True:  # a variable is what any of its assignments makes it
            before = dict(reader.kinds)
            reader.statements(tree.body)
            if reader.kinds == before:
                return True
    except _Asks:
        return False


def _inner(node: Any) -> Iterator[Any]:
    """The expressions in an expression; not what holds them (operands of a comparison, pairs of a dictionary)."""
    for child in node.iter_child_nodes():
        if isinstance(child, nodes.Helper):
            yield from _inner(child)
        else:
            yield child


def _asks_for_key(node: nodes.Compare) -> bool:
    """`"tool_calls" in message`: all messages here have the same keys."""
    return len(node.ops) == 1 and node.ops[0].op in ("in", "notin") and isinstance(node.expr, nodes.Const)


class _Reader:
    def __init__(self) -> None:
        self.kinds: dict[str, int] = {"messages": _MESSAGES}

    def statements(self, body: list[Any]) -> None:
        for node in body:
            self.statement(node)

    def statement(self, node: Any) -> None:
        if isinstance(node, nodes.Output):
            for part in node.nodes:
                self.text(part)
        elif isinstance(node, nodes.If):
            self.text(node.test)  # contents are not blank: whether a text is empty depends on roles alone
            for body in (node.body, node.elif_, node.else_):
                self.statements(body)
        elif isinstance(node, nodes.For) and not node.recursive:
            self.assign(node.target, {_ROLES: _ROLES, _MESSAGES: _MESSAGE}.get(self.kind(node.iter)))
            if node.test is not None:
                self.text(node.test)
            self.statements(node.body)
            self.statements(node.else_)
        elif isinstance(node, nodes.Assign):
            self.assign(node.target, self.kind(node.node))
        elif isinstance(node, nodes.AssignBlock) and node.filter is None:
            self.statements(node.body)
            self.assign(node.target, _TEXT)
        elif not isinstance(node, nodes.Break | nodes.Continue):
            raise _Asks

    def assign(self, target: Any, kind: int | None) -> None:
        if kind is None:
            raise _Asks
        if isinstance(target, nodes.Tuple) and kind == _ROLES:
            for item in target.items:
                self.assign(item, kind)
            return
        name = f"{target.name}.{target.attr}" if isinstance(target, nodes.NSRef) else getattr(target, "name", None)
        if name is None:
            raise _Asks
        self.kinds[name] = self.join(self.kinds.get(name, kind), kind)

    def join(self, a: int, b: int) -> int:
        if a != b and max(a, b) > _TEXT:
            raise _Asks
        return max(a, b)

    def text(self, node: Any) -> int:
        return self.among(node, _TEXT)

    def among(self, node: Any, most: int) -> int:
        kind = self.kind(node)
        if kind > most:
            raise _Asks
        return kind

    def kind(self, node: Any) -> int:
        if isinstance(node, nodes.Const | nodes.TemplateData):
            return _ROLES
        if isinstance(node, nodes.Name):
            return self.kinds.get(node.name, _ROLES)
        if isinstance(node, nodes.Getattr):
            return self.part(node.node, node.attr)
        if isinstance(node, nodes.Getitem):
            if isinstance(node.arg, nodes.Const) and isinstance(node.arg.value, str):
                return self.part(node.node, node.arg.value)
            return self.item(node)
        if isinstance(node, nodes.Add | nodes.Concat | nodes.And | nodes.Or):
            parts = node.nodes if isinstance(node, nodes.Concat) else (node.left, node.right)
            return max(map(self.text, parts))
        if isinstance(node, nodes.Not):
            self.text(node.node)
            return _ROLES
        if isinstance(node, nodes.CondExpr):
            self.text(node.test)
            other = _ROLES if node.expr2 is None else self.kind(node.expr2)
            return self.join(self.kind(node.expr1), other)
        if isinstance(node, nodes.Test) and node.name in _TYPE_TESTS:
            self.kind(node.node)
            return _ROLES
        if isinstance(node, nodes.Filter):
            return self.filtered(node)
        if isinstance(node, nodes.Call):
            called = node.node
            if isinstance(called, nodes.Getattr) and called.attr == "strip" and not (node.args or node.kwargs):
                return self.text(called.node)
        # Comparisons, arithmetic, literals, tests, calls: fine as long as nothing in them comes from a message.
        if not isinstance(node, nodes.Expr):
            raise _Asks
        if isinstance(node, nodes.Compare) and _asks_for_key(node):
            if self.kind(node.ops[0].expr) not in (_ROLES, _MESSAGE):
                raise _Asks
            return _ROLES
        for child in _inner(node):
            self.among(child, _ROLES)
        return _ROLES

    def part(self, node: Any, name: str) -> int:
        """`node.name` or `node["name"]`."""
        if isinstance(node, nodes.Name) and f"{node.name}.{name}" in self.kinds:
            return self.kinds[f"{node.name}.{name}"]  # of a namespace
        kind = self.among(node, _MESSAGE)
        if kind == _TEXT or (kind == _MESSAGE and hasattr(dict, name)) or name in ("previtem", "nextitem"):
            raise _Asks
        return _TEXT if kind == _MESSAGE and name == "content" else _ROLES  # other keys are not there, roles are known

    def item(self, node: Any) -> int:
        """`node[number]` or `node[from:to]`."""
        kind = self.kind(node.node)
        is_slice = isinstance(node.arg, nodes.Slice)
        for child in node.arg.iter_child_nodes() if is_slice else [node.arg]:
            self.among(child, _ROLES)
        if kind == _MESSAGES:
            return _MESSAGES if is_slice else _MESSAGE
        return self.among(node.node, _ROLES)

    def filtered(self, node: Any) -> int:
        if node.node is None:
            raise _Asks
        kind = self.kind(node.node)
        if node.args or node.kwargs or node.dyn_args or node.dyn_kwargs:
            for child in _inner(node):
                self.among(child, _ROLES)
        if kind == _TEXT and node.name not in ("trim", "string"):
            raise _Asks
        if kind == _MESSAGE or (kind == _MESSAGES and node.name not in ("length", "count")):
            raise _Asks
        return kind if kind == _TEXT else _ROLES
