"""What travels with the weights: code that `auto_map` names, licence and card; nothing from outside the folder."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from deepseek_jax.checkpoint import sidecars
from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.save import save_model
from tests.checkpoint.folders import QWEN2, random_folder

CODE = {"AutoConfig": "configuration_x.XConfig", "AutoModelForCausalLM": "modeling_x.XForCausalLM"}


def published(folder: Path, auto_map: dict, files: dict[str, bytes]) -> Path:
    random_folder(folder, QWEN2, "float32")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": auto_map}))
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def auto_map(folder: Path) -> dict | None:
    return json.loads((folder / "config.json").read_text()).get("auto_map")


def test_code_licence_and_card_come_through_conversion_export_and_training(tmp_path: Path):
    files = {
        "configuration_x.py": b"from .helpers_x import *\n",
        "modeling_x.py": b"#\r\n",
        "helpers_x.py": b"",
        **{"LICENSE": b"MIT", "LICENSE-MODEL": b"terms", "LICENSE.txt": b"t", "README.md": b"# x", "NOTICE": b"n"},
        **{"generation_config.json": b"{}", "special_tokens_map.json": b"{ }", "added_tokens.json": b"{}\n"},
        **{"tokenizer.model": b"\0\1", "vocab.json": b"{}", "merges.txt": b"#v\n", "chat_template.jinja": b"{{ 1 }}"},
    }
    source = published(tmp_path / "hf", CODE, files)
    convert_hf(open_folder(source), tmp_path / "converted")
    export_hf(open_folder(tmp_path / "converted"), tmp_path / "exported")
    save_model(load_model(tmp_path / "converted"), tmp_path / "trained", source=tmp_path / "converted")
    for name, content in files.items():
        for folder in ("converted", "exported", "trained"):
            assert (tmp_path / folder / name).read_bytes() == content, (folder, name)
    assert auto_map(tmp_path / "trained") == CODE
    assert (tmp_path / "exported" / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_auto_map_names_only_what_is_there(tmp_path: Path):
    """Entries of another repository stay: they are fetched from there."""
    entries = CODE | {
        "AutoTokenizer": ["owner/name--tokenization_x.Slow", None],
        "AutoModel": ["modeling_x.X", "gone.X"],
        "AutoProcessor": "../../etc/passwd.X",
        "AutoBackbone": 7,
    }
    source = published(tmp_path / "hf", entries, {"modeling_x.py": b""})
    export_hf(open_folder(source), tmp_path / "exported")
    kept = {name: entries[name] for name in ("AutoModelForCausalLM", "AutoTokenizer")}
    assert auto_map(tmp_path / "exported") == kept
    (source / "modeling_x.py").unlink()
    (source / "config.json").write_text((source / "config.json").read_text().replace("owner/name--", ""))
    save_model(load_model(source), tmp_path / "trained", source=source)
    assert auto_map(tmp_path / "trained") is None


def test_nothing_from_outside_the_folder_is_copied(tmp_path: Path):
    secret = tmp_path / "secret"
    secret.write_text("key")
    source = published(tmp_path / "hf", {"AutoConfig": "stolen.X"}, {})
    for name in ("stolen.py", "LICENSE", "README.md"):
        (source / name).symlink_to("../secret")
    (source / "README-loop.md").symlink_to("README-loop.md")
    os.mkfifo(source / "NOTICE")
    (source / "package.py").mkdir()
    (source / "large.py").write_bytes(b"#" * (sidecars.LARGEST + 1))
    export_hf(open_folder(source), tmp_path / "exported")
    assert {path.name for path in (tmp_path / "exported").iterdir()} == {
        *("config.json", "tokenizer.json", "model.safetensors")
    }
    assert auto_map(tmp_path / "exported") is None
    (source / "merges.txt").symlink_to(secret)
    with pytest.raises(ValueError, match=r"merges\.txt: is a link out of its folder"):
        export_hf(open_folder(source), tmp_path / "again")
    assert not (tmp_path / "again").exists() and not (tmp_path / ".again.partial").exists()


def test_the_cache_of_the_hub_is_links_into_its_blobs(tmp_path: Path):
    snapshot = published(tmp_path / "models--x" / "snapshots" / "abc", CODE, {"LICENSE": b"MIT", "modeling_x.py": b"1"})
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / str(number))
        path.symlink_to(f"../../blobs/{number}")
    convert_hf(open_folder(snapshot), tmp_path / "converted")
    assert (tmp_path / "converted" / "LICENSE").read_bytes() == b"MIT"
    assert (tmp_path / "converted" / "modeling_x.py").is_file()
    assert (tmp_path / "converted" / "tokenizer.json").is_file()


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", None])
def test_the_configuration_names_the_dtype_that_is_written(tmp_path: Path, key: str | None):
    source = published(tmp_path / "hf", {}, {})
    values = json.loads((source / "config.json").read_text())
    values = {name: value for name, value in values.items() if name not in ("dtype", "torch_dtype")}
    (source / "config.json").write_text(json.dumps(values | ({key: "float16"} if key else {})))
    for dtype in ("float32", "bfloat16"):
        model = load_model(source, dtype=dtype)
        model = model._replace(weights=jax.tree.map(jnp.zeros_like, model.weights))
        save_model(model, tmp_path / dtype, source=source)
        written = json.loads((tmp_path / dtype / "config.json").read_text())
        assert written == values | ({key: dtype} if key else {})
