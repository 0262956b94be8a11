"""tools/benchmark_convert.py: the checkpoint that it makes, how it measures a process, and what it prints."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors import deserialize

from deepseek_jax.checkpoint.names import published
from deepseek_jax.config import from_hf, to_hf
from deepseek_jax.model.decoder import abstract_weights
from tools import benchmark_convert
from tools.benchmark_convert import convert, sized_config, timed, write_checkpoint

TINY = 0.003  # gigabytes: three layers, width 64
BYTES = {"F8_E4M3": 1, "BF16": 2, "F32": 4}
NUMPY = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "BF16": ml_dtypes.bfloat16, "F32": np.float32}
FAITHFUL = "import shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2])\n"
ONE_BIT = """
from pathlib import Path
file = sorted(Path(sys.argv[2]).glob("*.safetensors"))[-1]
content = bytearray(file.read_bytes())
content[-1] ^= 1
file.write_bytes(content)
"""


def listed(config):
    return {t.name: t for t in published(config, abstract_weights(config)[1])}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint in shards of a megabyte, and its configuration."""
    folder, config = tmp_path_factory.mktemp("benchmark") / "hf", sized_config(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark_convert, "SHARD", 1_000_000)
        write_checkpoint(config, folder, seed=1)
    return folder, config


def stored(folder):
    """Every tensor as the safetensors library reads it, through the index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    found = {}
    for file in sorted(set(index["weight_map"].values())):
        for name, held in deserialize((folder / file).read_bytes()):
            value = np.frombuffer(held["data"], NUMPY[held["dtype"]]).reshape(held["shape"])
            found[name] = held["dtype"], value
            assert index["weight_map"][name] == file
    assert found.keys() == index["weight_map"].keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in found.values())
    return found


@pytest.mark.parametrize("gigabytes", [0.05, 1, 6, 50])
def test_the_size_is_the_one_asked_for(gigabytes):
    """Within 10 %, half a layer of the smallest of these."""
    config = sized_config(gigabytes)
    size = sum(np.prod(t.shape) * BYTES[t.dtype] for t in listed(config).values())
    assert abs(size / (gigabytes * 1e9) - 1) < 0.1
    assert config.quantization is not None and config.moe.n_routed_experts == 64
    assert from_hf(to_hf(config)) == config


def test_a_size_below_the_smallest_is_refused():
    with pytest.raises(ValueError, match=r"gigabytes: got 0\.0005, wanted at least 0\.0"):
        sized_config(0.0005)


def test_the_checkpoint_holds_what_is_published_and_finite_numbers(checkpoint):
    folder, config = checkpoint
    assert from_hf(json.loads((folder / "config.json").read_text())) == config
    found, wanted = stored(folder), listed(config)
    assert found.keys() == wanted.keys()
    assert "model.layers.1.self_attn.kv_a_proj_with_mqa.weight_scale_inv" in found
    for name, (dtype, value) in found.items():
        assert (dtype, value.shape) == (wanted[name].dtype, wanted[name].shape)
        assert np.all(np.isfinite(value.astype(np.float32)))
        assert dtype != "F32" or np.all(value > 0)


def test_fp8_weights_are_of_every_code_and_of_both_signs(checkpoint):
    dtype, value = stored(checkpoint[0])["model.layers.0.mlp.down_proj.weight"]
    assert dtype == "F8_E4M3"
    assert len(np.unique(value.view(np.uint8))) == 254


def test_shards_are_of_the_size_given_and_headers_padded(checkpoint):
    files = sorted(checkpoint[0].glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    for file in files:
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0 and len(content) - 8 - length <= 1_000_000


def test_the_seed_is_all_that_matters(checkpoint, tmp_path):
    folder, config = checkpoint
    first = stored(folder)  # in many shards; these are in one
    for seed, same in ((1, True), (2, False)):
        write_checkpoint(config, tmp_path / str(seed), seed=seed)
        again = stored(tmp_path / str(seed))
        for name in ("lm_head.weight", "model.layers.2.mlp.experts.63.up_proj.weight_scale_inv"):
            assert (first[name][1].tobytes() == again[name][1].tobytes()) == same
    names = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in (1, 2) for e in (0, 1)]
    assert len({first[name][1].tobytes() for name in names}) == 4


def test_the_mtp_modules_copies_are_copies(checkpoint):
    folder, config = checkpoint
    found, layer = stored(folder), f"model.layers.{config.num_hidden_layers}"
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert found[f"{layer}.{copy}.weight"][1].tobytes() == found[f"{original}.weight"][1].tobytes()


def test_the_peak_of_a_process_is_measured_though_it_gave_the_memory_back(tmp_path):
    """Between the 200 MiB that it held and 30 MiB more, an interpreter's own being about 10."""
    code = "import time; x = bytearray(b'1' * (100 << 20)); del x; time.sleep(0.3)"  # twice 100 MiB at once
    measured = timed([sys.executable, "-c", code], tmp_path, tmp_path)
    assert 200 < measured.peak / benchmark_convert.MIB < 230
    assert 0.3 < measured.seconds


def test_a_process_that_fails_is_named_with_its_last_line(tmp_path):
    with pytest.raises(ValueError, match=r"-c: exit status 3: no more$"):
        timed(
            [sys.executable, "-c", "import sys; print('so far', 'no more', sep='\\n', file=sys.stderr); sys.exit(3)"],
            tmp_path,
            tmp_path,
        )


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """Stand-ins for the two programs that copy the folder."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("convert_hf.py", "export_hf.py"):
        (folder / name).write_text(FAITHFUL)
    monkeypatch.setattr(benchmark_convert, "TOOLS", folder)
    return folder


def test_every_command_has_a_line_and_only_the_checkpoint_stays(tools, tmp_path, capsys):
    convert(tmp_path / "data", gigabytes=TINY, rounds=2, seed=5)
    out = capsys.readouterr().out
    (source,) = (tmp_path / "data").iterdir()
    size = sum(value.nbytes for _, value in stored(source).values())
    rows = re.findall(r"^\| (cp -r|convert_hf.py|export_hf.py) \| (\d+) \| (.*) \|$", out, re.MULTILINE)
    assert [(label, int(count)) for label, count, _ in rows] == [
        *(("cp -r", size), ("convert_hf.py", size), ("export_hf.py", size)),
    ]
    assert all(len(rest.split(" | ")) == 5 for _, _, rest in rows)
    assert f"all {len(stored(source))} tensors bit-identical" in out
    stamps = {file.name: file.stat().st_mtime_ns for file in source.iterdir()}
    convert(tmp_path / "data", gigabytes=TINY, rounds=1, seed=5)
    assert stamps == {file.name: file.stat().st_mtime_ns for file in source.iterdir()}


def test_one_bit_of_an_export_is_enough(tools, tmp_path):
    (tools / "export_hf.py").write_text(FAITHFUL + ONE_BIT)
    with pytest.raises(ValueError, match=r"exported: 1 of \d+ tensors differ"):
        convert(tmp_path / "data", gigabytes=TINY, rounds=1)
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_tensor_that_is_not_exported_is_missed(checkpoint):
    wanted = benchmark_convert._digests(checkpoint[0])
    got = {name: value for name, value in wanted.items() if name != "lm_head.weight"}
    with pytest.raises(ValueError, match="1 of .* 'lm_head.weight': got None"):
        benchmark_convert._require_identical(got, wanted)
    benchmark_convert._require_identical(wanted, wanted)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1_000_000))
    with pytest.raises(ValueError, match=r"0\.0 GB free, wanted 0\.0; choose another disk"):
        convert(tmp_path, gigabytes=TINY)
    assert not list(tmp_path.iterdir())


def test_the_programs_themselves_give_every_tensor_back(tmp_path, capsys):
    convert(tmp_path, gigabytes=TINY, rounds=1)
    out = capsys.readouterr().out
    assert "| convert_hf.py |" in out and "bit-identical to the source in every round" in out


@pytest.mark.oracle
@pytest.mark.parametrize(("latent", "loads"), [(448, True), (512, False)])
def test_transformers_is_a_line_or_a_failure(tools, latent, loads, tmp_path, capsys):
    convert(tmp_path / "data", gigabytes=TINY, rounds=1, latent=latent, transformers=True)
    out = capsys.readouterr().out
    assert ("| transformers |" in out) == loads and ("transformers failed: " in out) != loads
