"""A run's folder over several starts: who may go on in it, with which settings, and what it may write there."""

import errno
import json
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, write_whole
from deepseek_jax.checkpoint.lock import locked
from deepseek_jax.checkpoint.owned import check_owned
from deepseek_jax.train.loop import ended_nonfinite

SETTINGS, SUMMARY = "config.json", "summary.json"
RUN, BASE = "run", "base"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class RunSettings(NamedTuple):
    """The settings of a run as its folder keeps them.

    values: by the names of their options, as JSON has them. defaults: the same of a run without any option, for what
    a folder of an earlier version does not name. free: names of those that may change when the run goes on, because
    they say where it is computed, how often it reports, or how a thing is called. base: the fingerprint of the model
    it starts from, if there is one. remedies: names of those that may change too where the run was ended by numbers
    that are not finite.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    free: Collection[str]
    base: str | None = None
    remedies: Collection[str] = ()


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Keep other programs out of a run's folder; of several processes the main one holds it for all.

    Raises:
        ValueError: another program is in it; the message has its process and host.
    """
    with ExitStack() as lock:
        advice = "wait for it or stop it, or choose another --output"
        with distributed.together():
            if distributed.is_main():
                lock.enter_context(locked(folder, advice=advice))
        yield


@contextmanager
def room_needed(folder: Path) -> Iterator[None]:
    """Around all that a run writes: where a disk, a quota or a file is full, say what is kept and how to go on.

    Raises:
        OSError: what the system refused, with its file, and the newest whole checkpoint of the run.
    """
    try:
        yield
    except OSError as problem:
        if problem.errno not in _NO_ROOM:
            raise
        there = (path for path in folder.glob("checkpoints/*/*") if path.name.isdecimal())
        newest = max(there, key=lambda path: path.stat().st_mtime_ns, default=None)
        kept = "no checkpoint is whole yet" if newest is None else f"the last whole checkpoint is {newest}"
        raise OSError(
            f"{problem.filename or folder}: {str(problem.strerror).lower()}; {kept}: make room, then the same command "
            f"{'begins anew' if newest is None else 'goes on from it'}"
        ) from problem


def check_folder(folder: Path, settings: RunSettings, *, stage: str, writes: Collection[str]) -> None:
    """Refuse a folder in which a run with these settings cannot begin or go on. Changes nothing.

    A run may go on with other `free` settings and with more steps, also when it is finished; with other `remedies`
    where its last step was not finite.

    Args:
        folder: of the run.
        settings: of the run; `steps` are those of its last stage.
        stage: name of that stage.
        writes: names of the folders that the run writes at its end.

    Raises:
        ValueError: another run's settings or base model, fewer steps than are done, a finished run, or a folder among
            `writes` that is not this run's.
    """
    path = folder / SETTINGS
    held = read_json(path) if path.exists() else None
    if held is not None:
        _check_settings(path, held, settings, {*settings.free, *(settings.remedies if ended_nonfinite(folder) else ())})
        _check_base(path, held, settings)
        _check_steps(folder, held, settings, stage)
    for name in writes:
        check_owned(folder / name, None if held is None else held.get(RUN))


def _check_settings(path: Path, held: Mapping[str, Any], settings: RunSettings, free: Collection[str]) -> None:
    for name, value in settings.values.items():
        before = held.get(name, settings.defaults.get(name))
        if name != "steps" and name not in free and before != value:
            raise ValueError(
                f"{path}: the run there has {name} {before!r}, not {value!r}; give the same settings to go on with it, "
                "or another --output"
            )


def _check_base(path: Path, held: Mapping[str, Any], settings: RunSettings) -> None:
    before = held.get(BASE, settings.base)
    if before != settings.base:
        raise ValueError(
            f"{path}: the run there began with a base model of fingerprint {before}, and the one given has "
            f"{settings.base}: its files are others; give the same model, or another --output"
        )


def _check_steps(folder: Path, held: Mapping[str, Any], settings: RunSettings, stage: str) -> None:
    before, wanted = held.get("steps", settings.defaults.get("steps")), settings.values["steps"]
    if (folder / SUMMARY).exists() and wanted <= before:
        raise ValueError(
            f"{folder}: holds a finished run of {before} steps; raise --steps to go on with it, choose another "
            "--output, or remove it"
        )
    checkpoints = folder / "checkpoints" / stage
    done = (
        max((int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal()), default=0)
        if checkpoints.is_dir()
        else 0
    )
    if wanted < done:
        raise ValueError(
            f"{folder}: steps: got {wanted}, but the run there has done {done}; give --steps {done} or more, or "
            "another --output"
        )


def enter_folder(folder: Path, settings: RunSettings) -> str:
    """Write the settings that the run has from here on; the run's identity, which it keeps over all its starts.

    A finished run that goes on is no longer finished.
    """
    path = folder / SETTINGS
    run = (read_json(path).get(RUN) if path.exists() else None) or uuid.uuid4().hex
    (folder / SUMMARY).unlink(missing_ok=True)
    write_json(path, {RUN: run, BASE: settings.base, **settings.values})
    return run


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(values, indent=2).encode())
