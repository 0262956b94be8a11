"""Folders made to harm: each is refused in one line by the tool, within bounded time and memory."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_jax.checkpoint import files
from deepseek_jax.checkpoint.model_folder import open_folder
from tests.checkpoint.folders import LLAMA_TIED, random_folder

ROOT = Path(__file__).resolve().parents[2]
SECONDS, BYTES = 60, 2 << 30


def index(folder: Path, file: object) -> None:
    names = open_folder(folder).stored.entries
    (folder / files.SINGLE).rename(folder / "a.safetensors")
    weight_map = dict.fromkeys(names, "a.safetensors") | {"model.norm.weight": file}
    (folder / files.INDEX).write_text(json.dumps({"weight_map": weight_map}))


def config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def replaced(path: Path, make: Callable[[Path], None]) -> None:
    path.unlink(missing_ok=True)
    make(path)


ZERO = lambda path: path.symlink_to("/dev/zero")
HOSTILE = {
    "an index that is a pipe": lambda f: os.mkfifo(f / files.INDEX),
    "an index that is a loop": lambda f: (f / files.INDEX).symlink_to(files.INDEX),
    "an index that is a folder": lambda f: (f / files.INDEX).mkdir(),
    "an index that never ends": lambda f: ZERO(f / files.INDEX),
    "a configuration that never ends": lambda f: replaced(f / "config.json", ZERO),
    "a configuration that is a pipe": lambda f: replaced(f / "config.json", os.mkfifo),
    "a shard with a long name": lambda f: index(f, "é" * 3000),
    "a shard with escapes": lambda f: index(f, "\x1b]0;title\x07\x9b2J.safetensors"),
    "a shard with a NUL": lambda f: index(f, "a\0.safetensors"),
    "a shard with half a pair": lambda f: index(f, "\ud800.safetensors"),
    "a shard of another kind": lambda f: index(f, {"a": []}),
    "weights that never end": lambda f: replaced(f / files.SINGLE, ZERO),
    "an architecture with escapes": lambda f: config(f, model_type="\x1b[31m\u202e"),
    "a long architecture": lambda f: config(f, model_type="x" * 10**6),
    "deep settings": lambda f: (f / "config.json").write_text('{"rope_scaling":' + "[" * 10**5),
    "a quarter of a layer": lambda f: config(f, num_hidden_layers=0.25),
    "infinite width": lambda f: config(f, hidden_size=float("inf")),
}


def check(folder: Path, target: Path) -> None:
    limits = lambda: resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    command = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), str(folder), str(target)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    ran = subprocess.run(command, capture_output=True, timeout=5 * SECONDS, preexec_fn=limits, env=environment)
    said = ran.stderr.decode()
    assert ran.returncode == 1 and said.startswith("error: ") and said.count("\n") == 1, said[-2000:]
    assert len(said) < 2000 and said[:-1].isprintable(), said[:3000]
    assert not list(target.parent.glob(f"*{target.name}*"))
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < BYTES


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_the_tool_refuses_it_in_one_line(kind, tmp_path: Path):
    random_folder(tmp_path / "hf", LLAMA_TIED, "float32")
    HOSTILE[kind](tmp_path / "hf")
    check(tmp_path / "hf", tmp_path / "out")


@pytest.mark.parametrize("kind", HOSTILE)
def test_it_is_refused_before_any_weight_is_read(kind, tmp_path: Path):
    random_folder(tmp_path / "hf", LLAMA_TIED, "float32")
    HOSTILE[kind](tmp_path / "hf")
    with pytest.raises((ValueError, OSError)) as refused:
        open_folder(tmp_path / "hf")
    assert len(str(refused.value)) < 1500
