"""Which names of tests are the program's, which are libraries', and which of them are classes."""

import ast
import builtins
import importlib
import symtable
import sys
from collections.abc import Iterable, Iterator, Sequence

_ALIASES = {"np": "numpy", "numpy": "numpy", "pd": "pandas", "pandas": "pandas", "sp": "scipy", "scipy": "scipy"}
# Helpers that decide: where tests lack their import, they are these and never the program's own.
_CHECKERS = {
    **{name: "math" for name in ("isclose", "isnan", "isinf", "isfinite")},
    **{name: "numpy" for name in ("allclose", "array_equal", "array_equiv")},
    **{
        name: "numpy.testing"
        for name in ("assert_allclose", "assert_almost_equal", "assert_array_equal", "assert_array_almost_equal")
    },
}
# Where LeetCode's and LiveCodeBench's programs find names that they do not import.
_ASSUMED = (
    "typing",
    "collections",
    "heapq",
    "bisect",
    "itertools",
    "functools",
    "math",
    "string",
    "random",
    "datetime",
)
_DATA_METHODS = {
    name for kind in (str, list, dict, set, tuple, int, float, bytes, frozenset, complex) for name in dir(kind)
}
_MEMBER = (ast.In, ast.NotIn)
_LITERALS = (ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Set, ast.UnaryOp, ast.JoinedStr)


def bound_names(source: str) -> set[str]:
    """Names that a source gives a value at its top level, or by `global`."""
    tables = list(_tables(symtable.symtable(source, "tests", "exec")))
    top = {symbol.get_name() for symbol in tables[0].get_symbols() if _binds(symbol)}
    return top | {
        symbol.get_name()
        for table in tables[1:]
        for symbol in table.get_symbols()
        if symbol.is_declared_global() and symbol.is_assigned()
    }


def read_names(source: str) -> set[str]:
    """Names that a source reads from its module, at any depth."""
    tables = list(_tables(symtable.symtable(source, "tests", "exec")))
    read = {symbol.get_name() for symbol in tables[0].get_symbols() if symbol.is_referenced()}
    return read | {
        symbol.get_name()
        for table in tables[1:]
        for symbol in table.get_symbols()
        if symbol.is_referenced() and symbol.is_global()
    }


def free_names(source: str, known: Iterable[str] = ()) -> set[str]:
    """Names that a source reads and neither it nor `known` nor Python itself defines."""
    return read_names(source) - bound_names(source) - set(known) - set(dir(builtins))


def program_names(free: set[str], trees: Sequence[ast.AST]) -> tuple[set[str], list[str]]:
    """Splits the tests' free names into the program's and the libraries'.

    Args:
      free: names that the tests read and do not define.
      trees: the tests.

    Returns:
      The program's names, and import statements for the others.
    """
    called = {node.func.id for node in _nodes(trees, ast.Call) if isinstance(node.func, ast.Name)}
    modules = {name for name in free - called if name in sys.stdlib_module_names or name in _ALIASES}
    checkers = {name for name in free - modules if name in _CHECKERS}
    if not free - modules - checkers:  # one of them must be the program's
        checkers = set()
    imports = [f"import {_ALIASES.get(name, name)} as {name}" for name in sorted(modules)]
    imports += [f"from {_CHECKERS[name]} import {name}" for name in sorted(checkers)]
    return free - modules - checkers, imports


def assumed_imports(names: Iterable[str]) -> list[str]:
    """Import statements for names that online judges have imported for programs."""
    found = []
    for name in sorted(names):
        module = next((module for module in _ASSUMED if _exports(module, name)), None)
        if module is not None:
            found.append(f"from {module} import {name}")
        elif name in sys.stdlib_module_names:
            found.append(f"import {name}")
    return found


def class_names(names: Iterable[str], trees: Sequence[ast.AST]) -> set[str]:
    """Those of the names that tests treat as classes: capitalised, and used as no function's answer is.

    That is: in isinstance, except or a class's bases; before a dot; without arguments; compared with another of the
    program's values; in `with`; after `in`; or with an attribute, that data does not have, of what they make. What
    tests hold equal to data is an answer, whatever else they do with it.
    """
    found: set[str] = set()
    answers: set[str] = set()
    names = set(names)
    for tree in trees:
        made = {
            target.id: node.value.func.id
            for node in _nodes([tree], ast.Assign)
            if isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            found |= _evidence(node, made)
            if isinstance(node, ast.Compare):
                found |= _compared(node, names | set(made)) | _searched(node, made)
                answers |= _held_equal(node)
    return {name for name in found & names - answers if name[:1].isupper()}


def _evidence(node: ast.AST, made: dict[str, str]) -> set[str]:
    if isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
            return _named(node.args[1:])
        return _named([node.func]) if not node.args and not node.keywords else set()
    if isinstance(node, ast.ExceptHandler):
        return _named([node.type])
    if isinstance(node, ast.ClassDef):
        return _named(node.bases)
    if isinstance(node, ast.withitem):
        return _makers([node.context_expr])
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name):
            own = {node.value.id}
            return own | ({made[node.value.id]} if node.value.id in made and node.attr not in _DATA_METHODS else set())
        return _makers([node.value]) if node.attr not in _DATA_METHODS else set()
    return set()


def _compared(node: ast.Compare, own: set[str]) -> set[str]:
    """What makes the right side of a comparison, where the left is of the program's making."""
    return _makers(node.comparators) if _named([node.left]) & own else set()


def _searched(node: ast.Compare, made: dict[str, str]) -> set[str]:
    """What makes the container of an `in`."""
    pairs = zip(node.ops, node.comparators, strict=True)
    sides = [side for operator, side in pairs if isinstance(operator, _MEMBER)]
    return _makers(sides) | {made[side.id] for side in sides if isinstance(side, ast.Name) and side.id in made}


def _held_equal(node: ast.Compare) -> set[str]:
    """What makes one side of an equation, where the other is data."""
    sides = [node.left, *node.comparators]
    equal = all(isinstance(operator, ast.Eq) for operator in node.ops)
    return _makers(sides) if equal and any(isinstance(side, _LITERALS) for side in sides) else set()


def _named(nodes: Iterable[ast.AST | None]) -> set[str]:
    return {part.id for node in nodes if node is not None for part in ast.walk(node) if isinstance(part, ast.Name)}


def _makers(nodes: Iterable[ast.AST]) -> set[str]:
    return {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}


def _nodes(trees: Sequence[ast.AST], kind: type) -> Iterator[ast.AST]:
    return (node for tree in trees for node in ast.walk(tree) if isinstance(node, kind))


def _tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from _tables(child)


def _binds(symbol: symtable.Symbol) -> bool:
    return symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()


def _exports(module: str, name: str) -> bool:
    found = importlib.import_module(module)
    return name in getattr(found, "__all__", [key for key in vars(found) if not key.startswith("_")])
