"""Filter and caption expressions: the only text of a config that is ever run, after every piece of it was checked.

The guide's syntax is kept (`lambda s: s > 4.5`). A white list decides what an expression may contain; whatever is not
on it is refused by name before anything is compiled, and operations that can blow up (powers, repetition, `replace`,
`join`) are rewritten to bounded ones.
"""

import ast
import difflib
import warnings
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from warpcore.errors import UserError
from warpcore.text import brief

MAX_TEXT_LENGTH = 1000
MAX_NODES = 250
MAX_DEPTH = 25
MAX_SEQUENCE_LENGTH = 100_000
MAX_REPEATED = 10_000
"""Entries, and characters in them, of a list that `*` makes: each `in` looks through all of them."""
MAX_INTEGER_BITS = 4096
MAX_ROUND_DIGITS = 400

_BUILTINS: dict[str, Callable] = {
    function.__name__: function
    for function in (len, min, max, abs, round, int, float, str, bool, sum, any, all, sorted)
}
_STRING_METHOD_NAMES = (
    "lower upper casefold title capitalize swapcase strip lstrip rstrip removeprefix removesuffix startswith endswith "
    "replace split rsplit splitlines join count find rfind index isalpha isdigit isnumeric isalnum isascii isupper "
    "islower isspace"
)
_STRING_METHODS = frozenset(_STRING_METHOD_NAMES.split())
_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow)
_UNARY_OPERATORS = (ast.Not, ast.USub, ast.UAdd)
_NAMES = {
    ast.JoinedStr: "an f-string",
    ast.ListComp: "a comprehension",
    ast.SetComp: "a comprehension",
    ast.DictComp: "a comprehension",
    ast.GeneratorExp: "a comprehension",
    ast.NamedExpr: "an assignment",
    ast.Lambda: "a lambda inside the lambda",
    ast.Starred: "unpacking",
}
_NUMBERS = (int, float)
_LEAVES = (ast.boolop, ast.cmpop, ast.operator, ast.unaryop, ast.expr_context)


class ExpressionError(UserError):
    """The text is no expression that Warpcore runs; the message names the piece and its column."""


class Expression:
    """A checked expression, called with the values of one row. Picklable: it travels as text."""

    def __init__(self, text: str):
        self.text = text
        source = "lambda value: value" if text.strip() == "identity" else text.strip()
        self.function, checker = _compile(source)
        self.num_arguments = len(checker.parameters)
        self._keys = [tuple(sorted(checker.keys[name])) for name in checker.parameters]
        self._paths = [tuple(sorted(checker.paths[name], key=str)) for name in checker.parameters]
        self.tested_keys: frozenset = frozenset(checker.tested_keys)
        """Constants that are looked for in the first argument: `lambda j: "tags" not in j` -> {"tags"}."""
        self.only_keys: bool = not checker.uses_whole_argument
        """True where the first argument is used through those keys alone."""

    def keys_of(self, place: int) -> tuple[str, ...]:
        """Constant text keys that an argument is subscripted with: `lambda j: j["caption"]` -> ("caption",)."""
        return self._keys[place]

    def paths_of(self, place: int) -> tuple[tuple[str | int, ...], ...]:
        """Subscripts of subscripts of an argument: `lambda j: j["a"]["b"]` -> (("a",), ("a", "b"))."""
        return self._paths[place]

    @property
    def keys(self) -> tuple[str, ...]:
        """Those of the first argument."""
        return self.keys_of(0)

    def __call__(self, *values: Any) -> Any:
        return self.function(*values)

    def __reduce__(self):
        return Expression, (self.text,)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Expression) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


def compile_expression(text: str) -> Expression:
    """Check and compile `lambda a, b: ...` or the bare name `identity`.

    Raises:
        ExpressionError: names the piece that is not allowed and its column.
    """
    if not isinstance(text, str):
        raise ExpressionError(f"expected the text of a lambda such as 'lambda s: s > 4.5', found {brief(text)}")
    return Expression(text)


def near_names(name: str, names: Iterable[str]) -> str:
    """' Did you mean "x"?' for the names that resemble `name`, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, close))}?" if close else ""


def _compile(source: str) -> tuple[Callable, "_Checker"]:
    if len(source) > MAX_TEXT_LENGTH:
        raise ExpressionError(f"{source[:40]!r}...: {len(source)} characters, at most {MAX_TEXT_LENGTH} are allowed")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)
            tree = ast.parse(source, mode="eval")
    except SyntaxError as error:
        raise ExpressionError(f"{source[:200]!r}, column {error.offset}: {error.msg}") from None
    except (RecursionError, MemoryError, ValueError) as error:
        raise ExpressionError(f"{source[:40]!r}...: nested too deeply or not text ({error})") from None
    checker = _Checker(source)
    checked = checker.check(tree.body)
    try:
        return _evaluate(checked), checker
    except SyntaxError as error:
        raise ExpressionError(f"{source!r}: {error.msg}") from None


def _evaluate(checked: ast.expr) -> Any:
    """Run a tree that the checker has passed, with nothing in reach but the listed functions."""
    tree = ast.fix_missing_locations(ast.Expression(checked))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        code = compile(tree, "<expression>", "eval")
    return eval(code, {"__builtins__": {}, **_BUILTINS, **_BOUNDED})


class _Checker(ast.NodeTransformer):
    """Walks the tree, refuses every node that is not on the white list, and rewrites what has to be bounded."""

    def __init__(self, source: str):
        self.source = source
        self.parameters: list[str] = []
        self.keys: dict[str, set[str]] = {}
        self.paths: dict[str, set[tuple[str | int, ...]]] = {}
        self.tested_keys: set = set()
        self.uses_whole_argument = False
        self._depth = 0
        self._nodes = 0

    def check(self, node: ast.expr) -> ast.expr:
        if not isinstance(node, ast.Lambda):
            self.refuse(node, "an expression starts with 'lambda', or is the name identity")
        arguments = node.args
        if arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.posonlyargs or arguments.defaults:
            self.refuse(node, "a lambda takes plain arguments without defaults")
        self.parameters = [argument.arg for argument in arguments.args]
        for name in self.parameters:
            if name.startswith("_") or name in _BUILTINS:
                self.refuse(node, f"an argument can't be called {name!r}")
        if not self.parameters:
            self.refuse(node, "the lambda takes no argument")
        self.keys = {name: set() for name in self.parameters}
        self.paths = {name: set() for name in self.parameters}
        node.body = self.visit(node.body)
        return node

    def refuse(self, node: ast.AST, reason: str) -> NoReturn:
        piece = ast.get_source_segment(self.source, node) or type(node).__name__
        piece = piece if len(piece) <= 60 else piece[:57] + "..."
        column = getattr(node, "col_offset", 0) + 1
        text = self.source if len(self.source) <= 200 else self.source[:197] + "..."
        raise ExpressionError(f"{text!r}, column {column}: {piece!r} is not allowed: {reason}")

    def visit(self, node: ast.AST) -> Any:
        self._depth += 1
        self._nodes += 1
        if self._depth > MAX_DEPTH:
            self.refuse(node, f"nested more than {MAX_DEPTH} levels deep")
        if self._nodes > MAX_NODES:
            self.refuse(node, f"the expression has more than {MAX_NODES} pieces")
        visited = super().visit(node)
        self._depth -= 1
        return visited

    def generic_visit(self, node: ast.AST) -> ast.AST:
        name = _NAMES.get(type(node), type(node).__name__)
        self.refuse(node, f"{name} is not part of filter and caption expressions")

    def _visit_parts(self, node: ast.AST) -> ast.AST:
        for field, value in ast.iter_fields(node):
            if isinstance(value, list):
                setattr(node, field, [part if isinstance(part, _LEAVES) else self.visit(part) for part in value])
            elif isinstance(value, ast.AST) and not isinstance(value, _LEAVES):
                setattr(node, field, self.visit(value))
        return node

    visit_BoolOp = visit_IfExp = _visit_parts
    visit_Tuple = visit_List = visit_Set = _visit_parts

    def visit_Compare(self, node: ast.Compare) -> ast.AST:
        for left, operator, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            is_first = isinstance(right, ast.Name) and right.id == self.parameters[0]
            if is_first and isinstance(operator, ast.In | ast.NotIn) and isinstance(left, ast.Constant):
                self.tested_keys.add(left.value)
        return self._visit_parts(node)

    def visit_Dict(self, node: ast.Dict) -> ast.AST:
        if None in node.keys:
            self.refuse(node, "** is not allowed")
        return self._visit_parts(node)

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        if node.value is not None and type(node.value) not in (int, float, str, bool):
            self.refuse(node, f"constants of type {type(node.value).__name__} are not allowed")
        return node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if node.id not in self.parameters:
            known = ", ".join([*self.parameters, *_BUILTINS])
            self.refuse(node, f"unknown name; these are known: {known}")
        if node.id == self.parameters[0]:
            self.uses_whole_argument = True
        return node

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.AST:
        if not isinstance(node.op, _UNARY_OPERATORS):
            self.refuse(node, "of the unary operators only not, - and + are allowed")
        return self._visit_parts(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        if not isinstance(node.op, _OPERATORS):
            self.refuse(node, "of the arithmetic operators only + - * / // % ** are allowed")
        parts = [self.visit(node.left), self.visit(node.right)]
        bounded = {ast.Mult: "_multiply", ast.Mod: "_modulo", ast.Pow: "_power"}.get(type(node.op))
        if bounded:
            call = _call(bounded, parts, node)
            self._try_constants(call, node)
            return call
        node.left, node.right = parts
        return node

    def _try_constants(self, call: ast.Call, node: ast.BinOp) -> None:
        """Refuse `9**9**9` before the run rather than at its first row."""
        if any(isinstance(part, ast.Name) and part.id in self.parameters for part in ast.walk(call)):
            return
        try:
            _evaluate(call)
        except ArithmeticError:  # a division by zero may stand where it is never reached
            return
        except Exception as error:
            self.refuse(node, f"{type(error).__name__}: {error}")

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        index = node.slice
        parts = [index.lower, index.upper, index.step] if isinstance(index, ast.Slice) else [index]
        for part in parts:
            inner = part.operand if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub) else part
            if inner is not None and not (isinstance(inner, ast.Constant) and type(inner.value) in (int, str)):
                self.refuse(node, "a subscript is a constant number or text")
        self._note_path(node)
        is_argument = isinstance(node.value, ast.Name) and node.value.id in self.parameters
        if is_argument and isinstance(index, ast.Constant) and isinstance(index.value, str):
            self.keys[node.value.id].add(index.value)
        else:
            node.value = self.visit(node.value)
        return node

    def _note_path(self, node: ast.expr) -> None:
        path = []
        while isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            path.append(node.slice.value)
            node = node.value
        if isinstance(node, ast.Name) and node.id in self.paths:
            self.paths[node.id].add(tuple(reversed(path)))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        if node.keywords:
            self.refuse(node, "functions are called with plain arguments")
        function = node.func
        if isinstance(function, ast.Attribute):
            if function.attr not in _STRING_METHODS:
                known = ", ".join(sorted(_STRING_METHODS))
                self.refuse(function, f"the methods of text that may be called are {known}")
            parts = [self.visit(part) for part in (function.value, *node.args)]
            if function.attr in ("replace", "join"):
                return _call(f"_{function.attr}", parts, node)
            function.value, node.args = parts[0], parts[1:]
            return node
        if not isinstance(function, ast.Name) or function.id not in _BUILTINS:
            self.refuse(function, f"the functions that may be called are {', '.join(_BUILTINS)}")
        node.args = [self.visit(part) for part in node.args]
        return node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.refuse(
            node, "attributes can't be read; text methods such as .lower() can be called, and keys go in brackets"
        )


def _call(name: str, arguments: list[ast.expr], where: ast.AST) -> ast.AST:
    return ast.copy_location(ast.Call(ast.Name(name, ast.Load()), arguments, []), where)


def _bounded_length(length: int, most: int = MAX_SEQUENCE_LENGTH) -> None:
    if length > most:
        raise ValueError(f"makes a sequence of length {brief(length)}, at most {most} is allowed")


def _multiply(left: Any, right: Any) -> Any:
    if left.__class__ in _NUMBERS and right.__class__ in _NUMBERS:
        return left * right
    for sequence, times in ((left, right), (right, left)):
        if isinstance(sequence, str) and isinstance(times, int):
            _bounded_length(len(sequence) * times)
        elif isinstance(sequence, list | tuple) and isinstance(times, int):
            if any(isinstance(part, list | tuple | set | dict) for part in sequence):
                raise TypeError("repeating a list of lists is not allowed")
            size = sum(1 + (len(part) if isinstance(part, str) else 0) for part in sequence)
            _bounded_length(size * times, MAX_REPEATED)
    return left * right


def _modulo(left: Any, right: Any) -> Any:
    if isinstance(left, str):
        raise TypeError("% formats text here, which is not allowed")
    return left % right


def _power(base: Any, exponent: Any) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and base.bit_length() * exponent > MAX_INTEGER_BITS:
        raise ValueError(f"a power of more than {MAX_INTEGER_BITS} bits is not allowed")
    return base**exponent


def _replace(text: Any, old: Any, new: Any, *count: Any) -> str:
    if not (isinstance(text, str) and isinstance(old, str) and isinstance(new, str)):
        raise TypeError("replace works on text")
    _bounded_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new, *count)


def _join(separator: Any, parts: Any) -> str:
    if not isinstance(separator, str):
        raise TypeError("join works on text")
    _bounded_length(len(separator) * len(parts) + sum(map(len, parts)))
    return separator.join(parts)


def _round(value: Any, digits: Any = None) -> Any:
    if digits is not None and not (isinstance(digits, int) and abs(digits) <= MAX_ROUND_DIGITS):
        raise ValueError(f"rounding to other than {MAX_ROUND_DIGITS} digits at most is not allowed")
    return round(value, digits)


def _str(value: Any = "") -> str:
    if not isinstance(value, str | int | float | None):
        raise TypeError(f"str of a {type(value).__name__} is not allowed")
    return str(value)


def _sum(values: Any, start: Any = 0) -> Any:
    if not all(isinstance(value, int | float) for value in (*values, start)):
        raise TypeError("sum of other than numbers is not allowed")
    return sum(values, start)


_BOUNDED = {function.__name__: function for function in (_multiply, _modulo, _power, _replace, _join)}
_BOUNDED |= {"round": _round, "str": _str, "sum": _sum}
