"""Mutation operators: small faults planted into Python and Triton source, each one edit of the text.

A place is found by its AST node, and only the bytes of that place change. What decides how fast a result comes but
never which one (tiles, stages, registers, eviction) is left out, and so is what no result depends on: docstrings,
annotations, messages, imports, decorators.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

# Targets of assignments, keywords and keys of dictionaries whose values are schedule only, or an assertion.
SCHEDULE = re.compile(
    r"(num_)?(warps|stages)(_\w+)?|evict(ion)?(_\w+)?|block(_\w+)?|tiles|registers|unroll|elements|\w+_bytes|strict",
    re.IGNORECASE,
)
COMPARISONS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"), ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
}  # fmt: skip
ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.FloorDiv: ("//", "*"), ast.Div: ("/", "*"),
    ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.MatMult: ("@", "*"), ast.LShift: ("<<", ">>"),
}  # fmt: skip
COMMUTING = (ast.Add, ast.Mult)
BITS = (ast.BitAnd, ast.BitOr)
EXTREMES = {"minimum": "maximum", "maximum": "minimum", "min": "max", "max": "min"}
SYMMETRIC = {*EXTREMES, "zip", "arange"}  # or an error at once
SWAPPED_ARGUMENTS = {"dot": 0, "divmod": 0, "where": 1}  # the first of the two
ATOMS = (ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript)
SIMPLE = (ast.Name, ast.Constant, ast.Attribute, ast.Subscript)

Edit = tuple[int, int, str]  # bytes from, bytes to, what comes in their place


@dataclass(frozen=True)
class Mutant:
    """One fault. ``before`` and ``after`` are the lines that it changes, with single spaces."""

    file: str
    line: int
    operator: str
    before: str
    after: str
    source: str  # the whole file, mutated

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays when the file changes elsewhere."""
        return self.file, self.operator, self.before, self.after


class Source:
    """A file's text with the places of its nodes, in bytes, as ``ast`` counts columns."""

    def __init__(self, text: str) -> None:
        self.bytes = text.encode()
        self.starts = [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def span(self, node: ast.AST) -> tuple[int, int]:
        start, stop = self.starts[node.lineno - 1], self.starts[node.end_lineno - 1]
        return start + node.col_offset, stop + node.end_col_offset

    def text(self, node: ast.AST) -> str:
        start, stop = self.span(node)
        return self.bytes[start:stop].decode()

    def operand(self, node: ast.AST) -> str:
        """The node's text as an operand of anything; a node's own parentheses are no part of it."""
        return self.text(node) if isinstance(node, ATOMS) else f"({self.text(node)})"

    def between(self, left: ast.AST, right: ast.AST, old: str, new: str) -> Edit:
        """Another symbol between two operands."""
        start, stop = self.span(left)[1], self.span(right)[0]
        at = start + self.bytes[start:stop].index(old.encode())
        return at, at + len(old), new

    def replaced(self, node: ast.AST, new: str) -> Edit:
        return *self.span(node), new

    def swapped(self, one: ast.AST, other: ast.AST) -> Edit:
        start, stop = self.span(one)[0], self.span(other)[1]
        middle = self.bytes[self.span(one)[1] : self.span(other)[0]].decode()
        return start, stop, self.text(other) + middle + self.text(one)

    def mutant(self, file: str, operator: str, edit: Edit) -> Mutant:
        start, stop, new = edit
        mutated = self.bytes[:start] + new.encode() + self.bytes[stop:]
        first = self.bytes.rfind(b"\n", 0, start) + 1
        last = self.bytes.find(b"\n", stop) % (len(self.bytes) + 1)
        lines = self.bytes[first:last], mutated[first : last + len(mutated) - len(self.bytes)]
        before, after = (" ".join(line.decode().split()) for line in lines)
        return Mutant(file, self.bytes.count(b"\n", 0, start) + 1, operator, before, after, mutated.decode())


def comparison(source: Source, node: ast.AST) -> Iterator[Edit]:
    """A bound moved by one, an equality turned round."""
    if isinstance(node, ast.Compare):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            if type(op) in COMPARISONS:
                yield source.between(left, right, *COMPARISONS[type(op)])


def arithmetic(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Another operator between the same operands."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC:
        ends = (node.left, node.right) if isinstance(node, ast.BinOp) else (node.target, node.value)
        yield source.between(*ends, *ARITHMETIC[type(node.op)])


def dropped_term(source: Source, node: ast.AST) -> Iterator[Edit]:
    """One operand instead of both."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield source.replaced(node, source.operand(node.left))
        if isinstance(node.op, COMMUTING):
            yield source.replaced(node, source.operand(node.right))


def sign(source: Source, node: ast.AST) -> Iterator[Edit]:
    """A minus left out; a number with the other sign, or one where it was zero."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield source.replaced(node, source.operand(node.operand))
    if isinstance(node, ast.Constant) and isinstance(node.value, float):
        yield source.replaced(node, f"-{source.text(node)}" if node.value else "1.0")


def axis(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Another dimension."""
    if isinstance(node, ast.keyword) and node.arg in ("axis", "dim") and isinstance(node.value, ast.Constant):
        yield source.replaced(node.value, str({0: 1, 1: 0}.get(node.value.value, 1)))


def off_by_one(source: Source, node: ast.AST) -> Iterator[Edit]:
    """An integer one more and one less, a slice's end or a pointer one further."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        yield source.replaced(node, str(node.value + 1))
        yield source.replaced(node, str(node.value - 1))
    ends = [node.lower, node.upper] if isinstance(node, ast.Slice) else []
    pointers = node.args[:1] if _called(node) in ("load", "store") else []
    for place in (*ends, *pointers):
        if place and not isinstance(place, ast.Constant):
            yield source.replaced(place, f"{source.operand(place)} + 1")


def swapped(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Two operands, arguments or branches in each other's place."""
    if isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC and not isinstance(node.op, COMMUTING):
        symbol = ARITHMETIC[type(node.op)][0]
        yield source.replaced(node, f"{source.operand(node.right)} {symbol} {source.operand(node.left)}")
    if isinstance(node, ast.IfExp):
        yield source.swapped(node.body, node.orelse)
    first = SWAPPED_ARGUMENTS.get(_called(node))
    if first is not None and len(node.args) > first + 1:
        yield source.swapped(*node.args[first : first + 2])


def swapped_arguments(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Neighbouring arguments of a call, or values of a dictionary; of two that are schedule, neither."""
    if isinstance(node, ast.Call):
        for one, other in pairwise(node.args):
            both = (source.text(one), source.text(other))
            simple = isinstance(one, SIMPLE) and isinstance(other, SIMPLE) and _called(node) not in SYMMETRIC
            if simple and not all(map(SCHEDULE.fullmatch, both)):
                yield source.swapped(one, other)
    if isinstance(node, ast.Dict):
        values = _values(node)
        for one, other in pairwise(values):
            yield source.swapped(one, other)


def mask(source: Source, node: ast.AST) -> Iterator[Edit]:
    """One condition instead of both; no mask at all."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, BITS):
        yield from (source.replaced(node, source.operand(side)) for side in (node.left, node.right))
    if isinstance(node, ast.BoolOp):
        yield from (source.replaced(node, source.operand(value)) for value in node.values)
    if isinstance(node, ast.keyword) and node.arg == "mask":
        yield source.replaced(node.value, f"{source.operand(node.value)} | True")


def boolean(source: Source, node: ast.AST) -> Iterator[Edit]:
    """A condition turned round."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert):
        yield source.replaced(node, source.operand(node.operand))
    if isinstance(node, ast.BoolOp):
        symbols = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        yield source.between(*node.values[:2], *symbols)
    if isinstance(node, ast.Constant) and type(node.value) is bool:
        yield source.replaced(node, str(not node.value))
    tests = [node.test] if isinstance(node, ast.If | ast.IfExp) else getattr(node, "ifs", [])
    plain = (test for test in tests if not isinstance(test, ast.UnaryOp))
    yield from (source.replaced(test, f"(not {source.operand(test)})") for test in plain)


def transpose(source: Source, node: ast.AST) -> Iterator[Edit]:
    """Dimensions left as they are."""
    if _called(node) == "trans":
        yield source.replaced(node, source.operand(node.args[0]))
    if _called(node) in ("t", "transpose", "permute"):
        yield source.replaced(node, source.operand(node.func.value))
    if isinstance(node, ast.Attribute) and node.attr in ("mT", "T"):
        yield source.replaced(node, source.operand(node.value))


def extreme(source: Source, node: ast.AST) -> Iterator[Edit]:
    """The smaller instead of the larger."""
    if _called(node) in EXTREMES:
        stop = source.span(node.func)[1]
        yield stop - len(_called(node)), stop, EXTREMES[_called(node)]


def dropped_statement(source: Source, node: ast.AST) -> Iterator[Edit]:
    """A call for its effect, a second assignment or an early return left out."""
    effect = isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call))
    early = isinstance(node, ast.Return) and node.value is None
    names = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)} if isinstance(node, ast.Assign) else set()
    again = isinstance(node, ast.Assign) and source.text(node.targets[0]) in names
    if effect or early or again:
        yield source.replaced(node, "pass")


# Where two operators would make the same edit, the first has it.
OPERATORS: dict[str, Callable[[Source, ast.AST], Iterator[Edit]]] = {
    operator.__name__.replace("_", " "): operator
    for operator in (
        comparison, arithmetic, dropped_term, sign, axis, off_by_one, swapped, swapped_arguments, mask, boolean,
        transpose, extreme, dropped_statement,
    )
}  # fmt: skip


def mutants(file: str, text: str) -> list[Mutant]:
    """Every mutant of a file, in the order of their places."""
    source, edits = Source(text), {}
    for node in _nodes(ast.parse(text)):
        for name, operator in OPERATORS.items():
            for edit in operator(source, node):
                if source.bytes[edit[0] : edit[1]].decode() != edit[2]:
                    edits.setdefault(edit, name)
    return [source.mutant(file, name, edit) for edit, name in sorted(edits.items())]


def _called(node: ast.AST) -> str | None:
    """The last name of what a call calls."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", None))


def _nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that a result may depend on."""
    if not _is_left_out(node):
        yield node
        for child in _children(node):
            yield from _nodes(child)


def _children(node: ast.AST) -> Iterator[ast.AST]:
    if isinstance(node, ast.FunctionDef):
        return iter([*node.args.defaults, *filter(None, node.args.kw_defaults), *node.body])
    if isinstance(node, ast.ClassDef):
        return iter(node.body)
    if isinstance(node, ast.AnnAssign):
        return iter([node.value] if node.value else [])
    if isinstance(node, ast.Dict):
        return iter(_values(node))
    return ast.iter_child_nodes(node)


def _is_left_out(node: ast.AST) -> bool:
    if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
        return True
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return True  # a docstring
    names = [node.arg] if isinstance(node, ast.keyword) else []
    names += [target.id for target in getattr(node, "targets", []) if isinstance(target, ast.Name)]
    return any(SCHEDULE.fullmatch(name) or _is_alias(name) for name in names if name)


def _is_alias(name: str) -> bool:
    """Of a type, or __all__."""
    return name == "__all__" or (name[0].isupper() and not name.isupper())


def _values(node: ast.Dict) -> list[ast.AST]:
    """The values with a key of their own that is not schedule."""
    pairs = zip(node.keys, node.values, strict=True)
    return [value for key, value in pairs if key and not SCHEDULE.fullmatch(str(getattr(key, "value", "")))]
