"""A run of several stages: each a function of a model folder and files of data, marked done on disk.

A stage's folder holds stage.json: the settings that it was begun with, fingerprints of what it was given and of what it
gave, its report and its seconds. What is done is not done again; what was begun goes on, and that is the business of
the stage itself. Settings or inputs that are others than those on disk are refused, and the message says which.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.train.runs import write_json

MARK = "stage.json"
_BLOCK = 2**20


class Done(NamedTuple):
    """What a stage gives: the folder of a model, files of data by name, and what it reports, as JSON has it."""

    model: Path | None = None
    data: Mapping[str, Path] = {}
    report: Mapping[str, Any] = {}


class Stage(NamedTuple):
    """A stage.

    name: of its folder, too. does: of that folder, the model and the data to what it gives. settings: all that its
    outcome depends on, as JSON has it. model: the stage whose model it takes, or a folder. data: the files that it
    takes, by the names that it knows them by: (stage, that stage's name of it), or a path; (stage, "model") is one more
    model.
    """

    name: str
    does: Callable[[Path, Path | None, Mapping[str, Path]], Done]
    settings: Mapping[str, Any]
    model: str | Path | None = None
    data: Mapping[str, tuple[str, str] | Path] = {}


def run_stages(folder: Path, stages: Sequence[Stage]) -> dict[str, Done]:
    """Run what is not done, in order. All processes call it alike.

    Args:
        folder: of the run; every stage gets a folder of its name in it.
        stages: each takes models and data of those before it.

    Returns:
        What every stage gave, by name.

    Raises:
        ValueError: a stage on disk has other settings or inputs, something that a stage gave has changed since, or what
            the stage itself raises.
    """
    for stage in stages:  # before any of them runs
        distributed.on_main(lambda stage=stage: _check_settings(folder / stage.name / MARK, stage))
    found: dict[str, Done] = {}
    for stage in stages:
        found[stage.name] = _run(folder, stage, found)
    return found


def marks(folder: Path) -> list[dict[str, Any]]:
    """stage.json of every stage that was begun, in the order in which they were; by name where that is the same."""
    held = [read_json(path) | {"folder": path.parent.name} for path in folder.glob(f"*/{MARK}")]
    return sorted(held, key=lambda mark: (mark["number"], mark["folder"]))


def _run(folder: Path, stage: Stage, before: Mapping[str, Done]) -> Done:
    path = folder / stage.name / MARK
    model = before[stage.model].model if isinstance(stage.model, str) else stage.model
    data = {name: of if isinstance(of, Path) else _given(before[of[0]], of[1]) for name, of in stage.data.items()}
    inputs = distributed.on_main(lambda: _fingerprints(model, data))
    held = distributed.on_main(lambda: _check_inputs(path, stage, inputs))
    if held is not None and "outputs" in held:
        done = _done(path.parent, held)
        distributed.on_main(lambda: _check_outputs(path, held, done))
        _say(f"stage {stage.name}: done before, in {held['seconds']:.0f} s")
        return done
    mark = {
        "name": stage.name,
        "number": len(before),
        "settings": dict(stage.settings),
        "inputs": inputs,
        "from": {
            "model": str(stage.model) if stage.model else None,
            "data": {n: _told(of) for n, of in stage.data.items()},
        },
        "seconds": 0.0 if held is None else held["seconds"],
    }
    distributed.on_main(lambda: write_json(path, mark))
    _say(f"stage {stage.name}: begins" if held is None else f"stage {stage.name}: goes on")
    start = time.perf_counter()
    try:
        done = stage.does(path.parent, model, data)
    finally:  # what ends a start by an error or Ctrl-C; a kill loses the seconds of that start
        mark["seconds"] = round(mark["seconds"] + time.perf_counter() - start, 1)
        if distributed.is_main():
            write_json(path, mark)
    relative = lambda path_of: str(path_of.relative_to(path.parent) if path_of.is_relative_to(path.parent) else path_of)
    given = {
        "model": None if done.model is None else relative(done.model),
        "data": {name: relative(of) for name, of in done.data.items()},
        "digests": distributed.on_main(lambda: _fingerprints(done.model, done.data)),
    }
    distributed.on_main(lambda: write_json(path, mark | {"outputs": given, "report": dict(done.report)}))
    _say(f"stage {stage.name}: done in {mark['seconds']:.0f} s")
    return done


def _check_settings(path: Path, stage: Stage) -> None:
    if not path.exists():
        return
    held = read_json(path)["settings"]
    for name in (*stage.settings, *(name for name in held if name not in stage.settings)):
        before, now = held.get(name), stage.settings.get(name)
        if before != now:
            raise ValueError(
                f"{path}: the stage there has {name} {before!r:.80}, not {now!r:.80}; give the same settings to go on, "
                f"choose another --output, or remove {path.parent} and the stages after it"
            )


def _check_inputs(path: Path, stage: Stage, inputs: Mapping[str, str]) -> dict[str, Any] | None:
    """What is on disk of a stage; None where nothing is."""
    if not path.exists():
        return None
    held = read_json(path)
    changed = [name for name in {**held["inputs"], **inputs} if held["inputs"].get(name) != inputs.get(name)]
    if changed:
        raise ValueError(
            f"{path}: {stage.name} began with another {changed[0]}: its fingerprint was "
            f"{held['inputs'].get(changed[0])} and is {inputs.get(changed[0])}; put the same one back, choose another "
            f"--output, or remove {path.parent} and the stages after it"
        )
    return held


def _check_outputs(path: Path, held: Mapping[str, Any], done: Done) -> None:
    now = _fingerprints(done.model, done.data)
    changed = [name for name, digest in held["outputs"]["digests"].items() if now.get(name) != digest]
    if changed:
        raise ValueError(
            f"{path}: {changed[0]} of this stage was changed or removed after it was done; remove {path.parent} and "
            "the stages after it to run them again, or choose another --output"
        )


def _done(folder: Path, held: Mapping[str, Any]) -> Done:
    given = held["outputs"]
    model = None if given["model"] is None else folder / given["model"]
    return Done(model, {name: folder / of for name, of in given["data"].items()}, held["report"])


def _fingerprints(model: Path | None, data: Mapping[str, Path]) -> dict[str, str]:
    found = {} if model is None else {"model": fingerprint(model) if model.is_dir() else "absent"}
    return found | {f"data {name}": _digest(path) for name, path in data.items()}


def _digest(path: Path) -> str:
    if not path.is_file():
        return fingerprint(path) if path.is_dir() else "absent"
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _given(done: Done, name: str) -> Path:
    return done.model if name == "model" and done.model is not None else done.data[name]


def _told(of: tuple[str, str] | Path) -> str:
    return str(of) if isinstance(of, Path) else "/".join(of)


def _say(text: str) -> None:
    if distributed.is_main():
        print(distributed.printable(text), flush=True)
