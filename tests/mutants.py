"""Every mutant of a source file: one small mistake each, as a person could make it, in code that has a meaning.

Turned, each in a mutant of its own: comparisons (to the neighbour and to the opposite), ``and`` and ``or``, the tests
of ``if`` and of comprehensions, arithmetic and set operators, signs, numbers (one more), True and False, strings that
are compared, looked up or cut off. Taken out: what is returned, statements that are calls, ``raise``, ``continue``.

Left out: docstrings, annotations and types; what people read (the arguments of ``raise``, f-strings, sentences);
decorators, ``TYPE_CHECKING`` and ``__all__``; ``strict=`` of zip, which guards against our own mistakes; lone
assignments, whose removal any test sees.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TURNED: dict[type[ast.AST], tuple[type[ast.AST], ...]] = {
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.And: (ast.Or,),
    ast.Or: (ast.And,),
    ast.Add: (ast.Sub,),
    ast.Sub: (ast.Add,),
    ast.Mult: (ast.Div,),
    ast.Div: (ast.Mult,),
    ast.FloorDiv: (ast.Mult,),
    ast.Mod: (ast.Add,),
    ast.Pow: (ast.Mult,),
    ast.MatMult: (ast.Mult,),
    ast.BitAnd: (ast.BitOr,),
    ast.BitOr: (ast.BitAnd,),
    ast.USub: (ast.UAdd,),
}
#: Methods whose strings are looked up or cut off, not shown.
_LOOKS = {"get", "pop", "startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition", "split"}
_PASSED_OVER = {"annotation", "returns", "decorator_list"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One mistake: the file (``path`` in the repository), its number there, the lines of its statement (first, last),
    whether that runs only when a function does, and what becomes what."""

    path: str
    number: int
    lines: tuple[int, int]
    in_function: bool
    what: str

    @property
    def name(self) -> str:
        return f"{self.path}#{self.number}"


def mutants(root: Path, path: str) -> list[Mutant]:
    """All mutants of one file, in the order of the syntax tree."""
    found: list[Mutant] = []
    for change in _all_changes(_tree(root, path)):
        before = ast.unparse(change.shown)
        with change.made():
            after = ast.unparse(change.shown)
        told = f"{change.shown.lineno}: {before}  ->  {after if after != before else 'nothing'}"
        found.append(Mutant(path, len(found), _lines(change.inside), change.in_function, told))
    return found


def spoilt(root: Path, mutant: Mutant) -> str:
    """The text of the file with the mistake in it."""
    tree = _tree(root, mutant.path)
    for number, change in enumerate(_all_changes(tree)):
        if number == mutant.number:
            with change.made():
                return ast.unparse(tree)
    raise KeyError(mutant.name)


def _lines(statement: ast.stmt) -> tuple[int, int]:
    """First and last line; of a statement that holds others, those of its head."""
    body = getattr(statement, "body", None)
    return statement.lineno, (body[0].lineno - 1 if body else statement.end_lineno) or statement.lineno


def _tree(root: Path, path: str) -> ast.Module:
    return ast.parse((root / path).read_text(encoding="utf-8"))


@dataclass(frozen=True, slots=True)
class _Change:
    """A field of a node and its new value, the expression or statement that shows it, and the statement it is in."""

    shown: ast.expr | ast.stmt
    node: ast.AST
    field: str
    value: object
    inside: ast.stmt
    in_function: bool

    @contextmanager
    def made(self) -> Iterator[None]:
        """The change while it lasts."""
        before = getattr(self.node, self.field)
        setattr(self.node, self.field, self.value)
        yield
        setattr(self.node, self.field, before)


def _all_changes(tree: ast.Module) -> Iterator[_Change]:
    for node, shown, inside, in_function in _nodes(tree, tree.body[0], False):
        for owner, field, value in _changes(node):
            if isinstance(value, list) and field in ("body", "orelse"):
                step = next(old for old, new in zip(getattr(owner, field), value, strict=True) if old is not new)
                yield _Change(step, owner, field, value, step, in_function)
            else:
                yield _Change(shown, owner, field, value, inside, in_function)


def _nodes(
    node: ast.AST, inside: ast.stmt, in_function: bool
) -> Iterator[tuple[ast.AST, ast.expr | ast.stmt, ast.stmt, bool]]:
    """Every node that is worth a mutant, what shows it, the statement it is in, and whether a function runs it."""
    for name, value in ast.iter_fields(node):
        if name in _PASSED_OVER:
            continue
        runs = in_function or (isinstance(node, ast.FunctionDef) and name == "body")
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not _is_idle(child):
                within = child if isinstance(child, ast.stmt) else inside
                shown = child if isinstance(child, ast.expr | ast.stmt) else node
                yield child, shown, within, runs or isinstance(child, ast.FunctionDef)
                yield from _nodes(child, within, runs)


def _is_idle(node: ast.AST) -> bool:
    """What has no meaning, or only for people."""
    match node:
        case ast.JoinedStr() | ast.Raise() | ast.keyword(arg="strict"):
            return True
        case ast.If(test=ast.Name(id="TYPE_CHECKING")) | ast.Assign(targets=[ast.Name(id="__all__")]):
            return True
        case ast.Subscript(value=ast.Name(id="Callable" | "Literal" | "dict" | "list" | "tuple")):  # a type
            return True
    return False


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str, object]]:
    """The changes of this node itself: whose field, which, and its new value."""
    yield from ((node, field, value) for field, value in (*_operators(node), *_tests(node)))
    yield from ((string, "value", f"{string.value}x") for string in _strings(node))
    match node:
        case ast.Constant(value=bool()):
            yield node, "value", not node.value
        case ast.Constant(value=int() | float()):
            yield node, "value", node.value + 1
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant | ast.Compare):
            yield node, "value", ast.Constant(None)
        case ast.Expr(value=ast.Call() | ast.Yield() | ast.YieldFrom()):
            yield node, "value", ast.Constant(None)
    for name in ("body", "orelse"):
        steps = getattr(node, name, None)
        for at, step in enumerate(steps if isinstance(steps, list) else ()):
            if isinstance(step, ast.Raise | ast.Continue):
                yield node, name, [*steps[:at], ast.Pass(), *steps[at + 1 :]]


def _operators(node: ast.AST) -> Iterator[tuple[str, object]]:
    match node:
        case ast.Compare(ops=ops):
            for at, op in enumerate(ops):
                yield from (("ops", [*ops[:at], turned(), *ops[at + 1 :]]) for turned in _TURNED[type(op)])
        case ast.BinOp(op=ast.BitOr()) if _is_type(node.left) or _is_type(node.right):
            return
        case ast.BoolOp(op=op) | ast.BinOp(op=op) | ast.UnaryOp(op=op):
            yield from (("op", turned()) for turned in _TURNED.get(type(op), ()))


def _is_type(node: ast.expr) -> bool:
    """A type in ``one | other``, as of isinstance."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name.lstrip("_")[0].isupper() or name in ("int", "float", "str", "dict", "list", "tuple", "bool")
        case ast.BinOp(op=ast.BitOr()):
            return _is_type(node.left)
    return isinstance(node, ast.Subscript) or (isinstance(node, ast.Constant) and node.value is None)


def _tests(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Tests that no operator above turns."""

    def turned(test: ast.expr) -> ast.expr:
        return test.operand if isinstance(test, ast.UnaryOp) else ast.UnaryOp(ast.Not(), test)

    def is_plain(test: ast.expr) -> bool:
        return not isinstance(test, ast.Compare | ast.BoolOp)

    match node:
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if is_plain(test):
            yield "test", turned(test)
        case ast.comprehension(ifs=ifs):
            for at, test in enumerate(ifs):
                if is_plain(test):
                    yield "ifs", [*ifs[:at], turned(test), *ifs[at + 1 :]]
        case ast.BoolOp(values=values):
            for at, test in enumerate(values):
                if is_plain(test):
                    yield "values", [*values[:at], turned(test), *values[at + 1 :]]


def _strings(node: ast.AST) -> Iterator[ast.Constant]:
    """The strings that this node compares or looks up."""
    found: list[ast.expr | None] = []
    match node:
        case ast.Compare(left=left, comparators=others):
            found = [left, *others]
        case ast.Subscript(slice=key):
            found = [key]
        case ast.Dict(keys=keys):
            found = [*keys]
        case ast.Call(func=ast.Attribute(attr=method), args=args) if method in _LOOKS:
            found = [*args]
    for one in found:
        parts = one.elts if isinstance(one, ast.Tuple | ast.Set | ast.List) else [one]
        yield from (p for p in parts if isinstance(p, ast.Constant) and isinstance(p.value, str))
