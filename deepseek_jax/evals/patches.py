"""Unified diffs: found in a completion, read, and applied to a folder's files in memory; nothing outside is touched."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@.*")
_NONE = "/dev/null"
_MOST_HUNKS = 1_000


@dataclass
class _Hunk:
    start: int
    old: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)


@dataclass
class FilePatch:
    """What a diff does to one file: `before` is None where it makes it, `after` where it removes it."""

    before: str | None
    after: str | None
    hunks: list[_Hunk] = field(default_factory=list)


def diff_of(text: str, blocks: list[str]) -> str | None:
    """The diff in a completion: the last of its fenced blocks that is one, else what stands from "diff --git" on.

    Args:
        text: the completion after its thoughts.
        blocks: of it that are labelled diff or patch, or not labelled.
    """
    found = [block for block in blocks if re.search(r"^(?:diff --git |--- )", block, re.MULTILINE)]
    if found:
        return found[-1]
    plain = re.search(r"^(?:diff --git |--- \S).*", text, re.MULTILINE | re.DOTALL)
    return plain[0] if plain else None


def read_diff(text: str) -> list[FilePatch]:
    """The files of a unified diff.

    Raises:
        ValueError: it is none, or names a file outside the folder.
    """
    found: list[FilePatch] = []
    lines = text.replace("\r\n", "\n").split("\n")
    place = 0
    while place < len(lines):
        line = lines[place]
        if line.startswith("--- ") and place + 1 < len(lines) and lines[place + 1].startswith("+++ "):
            found.append(FilePatch(_path(line), _path(lines[place + 1])))
            place += 2
        elif (head := _HUNK.fullmatch(line)) is not None and found:
            hunk, place = _hunk(head, lines, place + 1)
            found[-1].hunks.append(hunk)
        else:
            if line.startswith(("Binary files ", "GIT binary patch", "rename from ", "copy from ")):
                raise ValueError(f"got {line[:60]!r}, wanted changes of text")
            place += 1
    if sum(len(file.hunks) for file in found) > _MOST_HUNKS:
        raise ValueError(f"got over {_MOST_HUNKS} hunks, wanted a change that a reader can follow")
    if not found or not any(file.hunks for file in found):
        raise ValueError("got no file with a change in it, wanted a unified diff")
    return found


def _path(line: str) -> str | None:
    """The file that a line --- or +++ names, without a/ or b/."""
    name = line[4:].split("\t")[0].strip()
    if name == _NONE:
        return None
    name = name[2:] if name[:2] in ("a/", "b/") else name
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name:
        raise ValueError(f"got the file {name!r:.80}, wanted one in the repository")
    return name


def _hunk(head: re.Match, lines: list[str], place: int) -> tuple[_Hunk, int]:
    """A hunk by the numbers of its head; a last line that lost its only space counts as an empty one."""
    hunk = _Hunk(int(head[1]))
    olds, news = (int(head[n]) if head[n] is not None else 1 for n in (2, 4))
    while len(hunk.old) < olds or len(hunk.new) < news:
        if place >= len(lines):
            raise ValueError("got a hunk that is cut off, wanted as many lines as its head says")
        line, place = lines[place], place + 1
        if line.startswith("\\"):
            continue
        mark, rest = line[:1] or " ", line[1:]
        if mark not in " +-":
            raise ValueError(f"got {line[:60]!r} in a hunk, wanted lines that begin with a space, + or -")
        if mark != "+":
            hunk.old.append(rest)
        if mark != "-":
            hunk.new.append(rest)
    return hunk, place


def applied(files: Mapping[str, bytes], patches: list[FilePatch]) -> dict[str, bytes]:
    """The files with a diff applied to them.

    A hunk stands where its old lines stand, nearest to the line that it names; the lines have to be equal.

    Raises:
        ValueError: a file that is not there, or is there already, or a hunk that fits nowhere.

    Source: git apply (offsets, no fuzz).
    """
    found = dict(files)
    for patch in patches:
        if patch.before is None:
            if patch.after is None or patch.after in found:
                raise ValueError(f"{patch.after}: is there already, wanted a new file")
            lines: list[str] = []
        else:
            if patch.before not in found:
                raise ValueError(f"{patch.before}: no such file in the repository")
            lines = found.pop(patch.before).decode("utf-8", "surrogateescape").split("\n")
        shift = 0
        for number, hunk in enumerate(patch.hunks, 1):
            start = _place(lines, hunk, shift)
            if start is None:
                raise ValueError(f"{patch.before or patch.after}: hunk {number} fits nowhere")
            shift = start - max(0, hunk.start - 1) + len(hunk.new) - len(hunk.old)
            lines[start : start + len(hunk.old)] = hunk.new
        if patch.after is not None:
            text = "\n".join(lines)
            if patch.before is None:
                text += "\n"
            found[patch.after] = text.encode("utf-8", "surrogateescape")
    return found


def _place(lines: list[str], hunk: _Hunk, shift: int) -> int | None:
    wanted = max(0, hunk.start - 1) + shift
    last = len(lines) - len(hunk.old)
    for distance in range(len(lines) + 1):
        for start in dict.fromkeys((wanted + distance, wanted - distance)):
            if 0 <= start <= last and _stands(lines, hunk.old, start):
                return start
    return None


def _stands(lines: list[str], old: list[str], start: int) -> bool:
    return not old or (lines[start] == old[0] and lines[start : start + len(old)] == old)
