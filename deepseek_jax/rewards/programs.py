"""The program in a completion."""

import ast
import re
import textwrap
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.text.think import after_thoughts, with_opening

# A fence may stand in a list or a quotation, indented; a backtick fence's label holds no backtick.
_FENCE = re.compile(r"((?:[ \t]|>|[-*+] |\d{1,3}[.)] )*)(`{3,}(?=[^`]*$)|~{3,})[ \t]*(.*?)[ \t]*")
_PYTHON = re.compile(r"\{?\.?(i?python|py)[0-9.]*(?![\w-])")
_MAX_PARSED = 1 << 20
_MAX_BLOCKS = 64


class _Block(NamedTuple):
    """A fenced block: its label in lower case, and its text."""

    label: str
    text: str


def extract_program(prompt: str, completion: str, names: frozenset[str] = frozenset()) -> str | None:
    """The program of a completion: a fenced block of Python after the thoughts.

    Blocks without a label count where none is labelled Python; in `<answer>` tags they count first. Of several, it is
    the last that defines what the tests need, or all together where each defines a part of it; without such names the
    last that compiles and is no mere usage of an earlier one; else the last. A block whose fence never closes, as in an
    answer that was cut off, counts too; one that is indented is dedented.

    Args:
      prompt: what the model was given.
      completion: what it wrote.
      names: top-level names that the tests need.

    Returns:
      The block's text; None where there is none.
    """
    final = after_thoughts(with_opening(prompt, completion))
    opened, tag, answer = final.rpartition("<answer>")
    blocks = list(_blocks(answer.partition("</answer>")[0])) if tag else []
    blocks = blocks or list(_blocks(final))
    programs = [block.text for block in blocks if _PYTHON.match(block.label)]
    programs = programs or [block.text for block in blocks if not block.label]
    return _choose(programs, names)


def labelled_blocks(text: str, labels: Sequence[str]) -> list[str]:
    """The fenced blocks after a completion's thoughts that have one of these labels, in order.

    Args:
      text: a completion with the `<think>` that its prompt opened.
      labels: in small letters; "" takes blocks without one.
    """
    return [block.text for block in _blocks(after_thoughts(text)) if block.label in labels]


def _choose(programs: list[str], names: frozenset[str]) -> str | None:
    if len(programs) < 2:
        return programs[0] if programs else None
    trees = [(program, _parsed(program)) for program in programs[-_MAX_BLOCKS:]]
    whole = [(program, tree, _defined(tree)) for program, tree in trees if tree is not None]
    wanted = names & set().union(*(defined for _, _, defined in whole))
    if wanted:
        # The last of those that define most; a solution in pieces is put together.
        program, _, defined = max(reversed(whole), key=lambda item: len(item[2] & wanted))
        return program if wanted <= defined else "\n".join(program for program, _, _ in whole)
    chosen = whole.pop() if whole else None
    while chosen and whole:
        earlier = whole.pop()
        if not chosen[2] and earlier[2] and _uses(chosen[1], earlier[2]):
            chosen = earlier
    return chosen[0] if chosen else programs[-1]


def _parsed(program: str) -> ast.Module | None:
    if len(program) > _MAX_PARSED:
        return None
    try:
        return ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _defined(tree: ast.Module) -> set[str]:
    """The functions and classes of a program's top level, and lambdas that have a name."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    found = {node.name for node in tree.body if isinstance(node, kinds)}
    assigned = (node for node in tree.body if isinstance(node, ast.Assign))
    return found | {target.id for node in assigned for target in node.targets if isinstance(target, ast.Name)
                    and not isinstance(node.value, ast.Constant)}  # fmt: skip


def _uses(usage: ast.Module, defined: set[str]) -> bool:
    return any(isinstance(node, ast.Name) and node.id in defined for node in ast.walk(usage))


def _blocks(text: str) -> Iterator[_Block]:
    fence, label, indent = "", "", ""
    lines: list[str] = []
    for line in text.split("\n"):
        match = _FENCE.fullmatch(line.removesuffix("\r")) if "```" in line or "~~~" in line else None
        if not fence and match:
            fence, label, indent, lines = match[2], match[3].lower(), match[1], []
        elif fence and match and match[2].startswith(fence) and not match[3]:
            yield _Block(label, _dedented(lines, indent))
            fence = ""
        elif fence:
            lines.append(line)
    if fence and lines:
        yield _Block(label, _dedented(lines, indent))


def _dedented(lines: list[str], indent: str) -> str:
    """Without the indentation, or the marks of a quotation, of the fence."""
    mark = r"[ \t]*>[ \t]?" if ">" in indent else rf"[ \t]{{0,{len(indent.expandtabs(4))}}}"
    text = "\n".join(re.sub(f"^{mark}", "", line) if indent else line for line in lines) + "\n"
    return textwrap.dedent(text) if text.lstrip("\r\n")[:1] in (" ", "\t") else text
