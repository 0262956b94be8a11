"""Models by their names on the hub: a cache as huggingface_hub lays it out, without a network."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.headers import read_header
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.checkpoint.summary import of_model
from deepseek_jax.cli import run
from deepseek_jax.commands import inspect
from deepseek_jax.text.tokenizer import Tokenizer
from tests.checkpoint.folders import QWEN2, random_folder

pytestmark = pytest.mark.usefixtures("quick_compilation")

COMMITS = {"main": "a" * 40, "v1.0": "b" * 40}


def cached(cache: Path, repository: str, revision: str, folder: Path) -> Path:
    """Lay a folder's files into a cache: blobs by their hashes, links to them in a snapshot, the revision's commit."""
    place = cache / ("models--" + repository.replace("/", "--"))
    snapshot = place / "snapshots" / COMMITS[revision]
    for name in (place / "blobs", place / "refs", snapshot):
        name.mkdir(parents=True, exist_ok=True)
    (place / "refs" / revision).write_text(COMMITS[revision])
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = place / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


@pytest.fixture
def folder(tmp_path) -> Path:
    random_folder(tmp_path / "hf", QWEN2, "float32", shards=2)
    Tokenizer.characters("abc", chat_template="{{ messages[0].content }}").save(tmp_path / "hf")
    return tmp_path / "hf"


def test_a_name_is_the_snapshot_and_reads_through_its_links(cache, folder, tmp_path):
    snapshot = cached(cache, "owner/name", "main", folder)
    assert model_folder("owner/name") == snapshot == model_folder(Path("owner/name"), weights=False)
    wanted, found = (names.flat(load_model(of).weights) for of in (folder, "owner/name"))
    assert wanted.keys() == found.keys() and len(found) > 10
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert Tokenizer.from_folder("owner/name").files == Tokenizer.from_folder(folder).files
    save_model(load_model("owner/name"), tmp_path / "saved", source=model_folder("owner/name"))
    assert not any(file.is_symlink() for file in (tmp_path / "saved").iterdir())
    assert (tmp_path / "saved" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()


def test_a_revision_is_another_snapshot(cache, folder, tmp_path):
    snapshots = [cached(cache, "owner/name", revision, folder) for revision in COMMITS]
    assert model_folder("owner/name@v1.0") == snapshots[1] != snapshots[0] == model_folder("owner/name@main")
    assert model_folder(f"owner/name@{COMMITS['v1.0']}") == snapshots[1]
    with pytest.raises(ValueError, match="owner/name@v2: no such folder, and no model of that name in the hub's cache"):
        model_folder("owner/name@v2")


def test_a_folder_that_exists_wins(cache, folder, tmp_path, monkeypatch):
    cached(cache, "owner/name", "main", folder)
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    assert model_folder("owner/name") == Path("owner/name")


@pytest.mark.parametrize(
    "model, says",
    [
        ("nowhere", "nowhere: no such folder; wanted a model's, or a name on the hub such as owner/name"),
        ("/no/where", "/no/where: no such folder; wanted"),
        ("../no/where", "../no/where: no such folder; wanted"),
        ("./nowhere", "./nowhere: no such folder; wanted"),
        ("owner/name@", "owner/name@: no such folder; wanted"),
        ("owner/name", "owner/name: no such folder, and no model of that name in the hub's cache"),
        ("owner/na..me", "owner/na..me: no such folder, and no model of that name in the hub's cache"),
    ],
)
def test_what_is_neither_is_called_that(cache, model, says):
    with pytest.raises(ValueError) as problem:
        model_folder(model)
    assert str(problem.value).startswith(says) and "\n" not in str(problem.value)


def test_what_is_fetched_runs_nothing(monkeypatch, tmp_path):
    """The names that a repository may hold, and those of them that are asked for."""
    from huggingface_hub.utils import filter_repo_objects

    asked = {}
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *of, **more: asked.update(more) or str(tmp_path))
    held = (
        "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja merges.txt "
        "model-00001-of-00002.safetensors model.safetensors.index.json adapter_model.safetensors tokenizer.model"
    ).split()
    others = (
        "pytorch_model.bin model.pt training_args.bin modeling_x.py README.md consolidated.safetensors x.pkl "
        "original/consolidated.00.pth original/params.json onnx/model.onnx model.gguf tf_model.h5 x.safetensors.exe"
    ).split()
    for weights in (True, False):
        model_folder("owner/name", weights=weights)
        kept = filter_repo_objects(
            held + others, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
        )
        assert set(kept) == {name for name in held if weights or not name.endswith(".safetensors")}


def test_a_command_takes_a_name(cache, folder, monkeypatch, capsys):
    cached(cache, "owner/name", "main", folder)
    found = subprocess.run(
        [sys.executable, "-m", "deepseek_jax", "inspect", "owner/name"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    monkeypatch.setattr(sys, "argv", ["inspect", str(folder)])
    run(inspect.main)
    assert capsys.readouterr().out == found.stdout != ""
    monkeypatch.setattr(sys, "argv", ["inspect", "owner/other"])
    with pytest.raises(SystemExit) as stop:
        run(inspect.main)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and error.count("\n") == 1
    assert error.startswith("error: owner/other: no such folder, and no model of that name in the hub's cache")


def test_of_a_name_whose_weights_are_not_here_the_headers_are_fetched_alone(cache, folder, monkeypatch):
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    asked, headers = [], {file.name: read_header(file) for file in folder.glob("*.safetensors")}
    wanted = of_model(folder)
    for file in headers:
        (folder / file).unlink()
    cached(cache, "owner/name", "v1.0", folder)

    def fetched(repository, *, revision):
        asked.append((repository, revision))
        info = lambda entry: TensorInfo(entry.dtype, list(entry.shape), (entry.start, entry.start + entry.nbytes))
        files = {
            file: SafetensorsFileMetadata({}, {name: info(entry) for name, entry in header.entries.items()})
            for file, header in headers.items()
        }
        return SafetensorsRepoMetadata(None, True, {}, files)

    with pytest.raises(ValueError, match=r"owner/name@v1.0: no weights of it .* their headers were not fetched"):
        of_model("owner/name@v1.0")
    monkeypatch.setattr("huggingface_hub.get_safetensors_metadata", fetched)
    assert of_model("owner/name@v1.0") == wanted and wanted.tensors > 10
    assert asked == [("owner/name", "v1.0")]
    headers[file].entries["strange"] = headers[file].entries.popitem()[1]._replace(dtype="F8_E5M2", shape=(10**30,))
    with pytest.raises(ValueError, match="owner/name@v1.0/model-.*strange"):
        of_model("owner/name@v1.0")
