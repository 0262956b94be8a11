"""The command line of tools/plan.py: one plan, many, a given memory, and what is refused."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from deepseek_jax.commands.plan import main, read_memory
from deepseek_jax.config import PRESETS, preset, to_hf
from deepseek_jax.plan.chips import CHIPS, chip
from deepseek_jax.plan.planner import plan

ROOT = Path(__file__).resolve().parents[2]
KEYS = {
    *(
        "model",
        "workload",
        "dtype",
        "kv_cache_dtype",
        "moments",
        "phases",
        "chip",
        "chips",
        "slice",
        "mesh",
        "rollout_mesh",
        "batch",
        "context",
    ),
    *("fits", "tight", "memory", "hbm", "limit", "seconds", "bound", "tokens_per_second"),
    *("prefill_tokens_per_second", "assumed", "weights_share", "rule_of_thumb", "commands"),
}
KINDS = {
    *("weights", "reference", "optimizer", "gradient", "computed", "serving", "cache", "activations", "workspace"),
    "total",
}


@pytest.fixture
def call(command_line):
    return command_line(main)


@pytest.mark.parametrize("workload", ["serve", "train", "grpo"])
def test_one_plan_as_json_is_the_planners(workload, call):
    status, text, error = call("v2-lite", "--chip", "v6e", "--chips", 16, "--workload", workload, "--json")
    found = json.loads(text)
    assert (status, error) == (0, "")
    assert found.keys() == KEYS and found["memory"].keys() == KINDS
    wanted = plan("v2-lite", preset("v2-lite"), chip("v6e"), chips=16, workload=workload)
    assert found.items() >= json.loads(json.dumps(wanted.as_json())).items()
    assert found["memory"]["total"] == sum(size for kind, size in found["memory"].items() if kind != "total")
    assert found["seconds"].keys() == {"compute", "memory", "collective"}
    assert found["seconds"][found["bound"]] == max(found["seconds"].values())
    assert found["rule_of_thumb"] == {"memory": None, "tensor_parallel": 8}


def test_one_plan_as_text(call):
    status, text, error = call("r1-671b", "--chip", "v5e", "--dtype", "fp8")
    assert (status, error) == (0, "")
    assert "r1-671b, serve, fp8, 64 x v5e" in text and "chips         64 x v5e (8x8)\n" in text
    assert "fits          yes; the weights alone are 65.7 % of all memory" in text
    assert "mesh          expert 4, tensor 16\n" in text and "Rule of thumb: 400-480 GB in 4 bits" in text
    assert "tokens/s, " in text and "bound by " in text and "Speeds are rooflines at 50 % of the peak compute" in text


def test_the_precision_is_the_programs(call):
    """FP8 files are unpacked to bfloat16, and a plan says so; a model that is published in it needs no word of that."""
    text = call("r1-671b", "--chip", "v5e")[1]
    assert "r1-671b, serve, bf16, 128 x v5e" in text
    assert "FP8 checkpoints are unpacked to bf16; --dtype fp8 plans to serve them as they are stored.\n" in text
    assert "unpacked" not in call("distill-qwen-7b", "--chip", "h100")[1]
    assert "unpacked" not in call("r1-671b", "--chip", "v5p", "--workload", "train")[1]
    assert "unpacked" in call("--chip", "h200")[1]


def test_what_does_not_fit_has_exit_status_3(call):
    status, text, error = call("r1-671b", "--chip", "h100", "--chips", 8)
    assert (status, error) == (3, "") and "fits          no;" in text and "tokens/s" not in text
    status, text, _ = call("r1-671b", "--chip", "h100", "--chips", 8, "--json")
    assert status == 3 and json.loads(text)["fits"] is False


def test_a_model_on_all_chips_and_all_models_on_a_chip(call):
    status, text, error = call("r1-671b", "--json")
    assert (status, error) == (0, "")
    assert [each["chip"] for each in json.loads(text)["plans"]] == [each.name for each in CHIPS]
    status, text, error = call("--chip", "v5e", "--workload", "train", "--json")
    assert (status, error) == (0, "")
    found = json.loads(text)["plans"]
    assert [each["model"] for each in found] == [name for name in PRESETS if name != "tiny"]
    assert {each["fits"] for each in found} == {True, False}
    text = call("--chip", "h200")[1]
    assert all(name in text for name in PRESETS if name != "tiny") and "24-48 GB" in text


def test_i_have_24_gb(call):
    status, text, error = call("--memory", "24GB", "--json")
    found = json.loads(text)
    assert (status, error, found["memory"], found["context"]) == (0, "", 24_000_000_000, 4096)
    fitting = {each["model"]: each["dtype"] for each in found["advice"]}
    assert fitting["distill-qwen-7b"] == "bf16" and fitting["distill-qwen-32b"] == "int4"
    text = call("--memory", "24GB")[1]
    assert "24.0 GB on one device" in text and "Recommended: distill-qwen-32b in int4" in text and "8-16 GB" in text
    assert "No published model fits in 1.0 GB" in call("--memory", "1GB")[1]


def test_a_model_in_a_given_memory(call):
    status, text, _ = call("r1-671b", "--memory", "80 GB", "--json")
    found = json.loads(text)["advice"]
    assert status == 0 and [each["dtype"] for each in found] == ["bf16", "fp8", "int8", "int4"]
    assert [each["fits"] for each in found] == [False] * 4
    assert [each["devices"] for each in found] == [32, 16, 16, 8]
    assert "8 such devices hold it in int4" in call("r1-671b", "--memory", "80GB")[1]
    found = json.loads(call("distill-qwen-7b", "--memory", "24GB", "--dtype", "fp8", "--json")[1])["advice"]
    assert [(each["dtype"], each["fits"]) for each in found] == [("fp8", True)]


def test_a_folder_is_a_model(call, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text(json.dumps(to_hf(preset("distill-qwen-7b"))))
    mine = json.loads(call(tmp_path / "mine", "--chip", "h100", "--json")[1])
    known = json.loads(call("distill-qwen-7b", "--chip", "h100", "--json")[1])
    assert mine.pop("model") == "mine" and known.pop("model") == "distill-qwen-7b"
    folder = mine["commands"].pop("compile")
    assert folder == known["commands"].pop("compile").replace("distill-qwen-7b", str(tmp_path / "mine"))
    assert mine == known


def test_a_plan_says_which_command_runs_it(call):
    """Whole lines, to be copied; what no program does is an estimate, and says what is missing."""
    text = call("distill-qwen-7b", "--chip", "rtx5090")[1]
    assert "run by        deepseek-jax generate FOLDER --prompt TEXT\n" in text
    assert "missing" not in text and "compiled by" not in text  # there is no compiler's description of that GPU
    text = call("r1-671b", "--chip", "h200", "--dtype", "fp8")[1]
    assert "run by        deepseek-jax generate FOLDER --prompt TEXT --quantization fp8 --serve-expert " in text
    assert " --quantization fp8\n" in text.partition("compiled by")[2] and "unpacked" not in text
    text = call("r1-671b", "--chip", "h200", "--chips", 16, "--batch", 128)[1]
    assert "run by        deepseek-jax generate FOLDER --prompt TEXT --serve-expert " in text and "missing" not in text
    assert "compiled by   deepseek-jax compile --preset r1-671b --topology h200:2x8 --step decode " in text
    found = json.loads(call("v2-lite", "--chip", "v6e", "--chips", 16, "--workload", "grpo", "--json")[1])
    mesh = {axis: size for axis, size in found["mesh"].items() if size > 1}
    run = found["commands"]["run"]
    assert run.startswith("deepseek-jax train --model FOLDER --data FILE --mesh-")
    assert all(f" --mesh-{axis} {size} " in run for axis, size in mesh.items())
    sampling = found["rollout_mesh"]
    assert " --scan-layers --remat all_but_attention --dtype bfloat16 --moments float32 --serve-expert " in run
    serve = f" --serve-expert {sampling['expert']} --serve-tensor {sampling['tensor']} "
    assert f"{serve}--prompts-per-step {found['batch'] // 16} --group-size 16 " in run
    assert found["phases"].keys() == {"transfer", "rollout", "scoring", "update"}
    assert max(each["total"] for each in found["phases"].values()) == found["memory"]["total"]
    text = call("v2-lite", "--chip", "v6e", "--chips", 16, "--workload", "grpo", "--moments", "bfloat16")[1]
    assert all(word in text for word in ("transfer", "rollout", "scoring", "update", "of its memory", "serving"))
    assert " --moments bfloat16 --serve-expert " in text and text.count("--moments bfloat16") == 2
    assert f"--topology v6e:4x4 --step grpo --batch {found['batch']} " in found["commands"]["compile"]
    assert found["commands"]["missing"] == []
    assert "generate" in call("--chip", "h100")[1] and "generate" in call("--chip", "h100", "--dtype", "fp8")[1]


def test_the_commands_of_a_plan_parse(call, command_line, monkeypatch):
    """Their options are those that the programs have."""
    train = json.loads(call("v2-lite", "--chip", "v7x", "--workload", "train", "--json")[1])["commands"]
    assert train["missing"] == []
    grpo = json.loads(call("v2-lite", "--chip", "h100", "--workload", "grpo", "--json")[1])["commands"]
    steps = [train["compile"], grpo["compile"], *grpo["compile_also"]]
    assert [line.split("--step ")[1].split()[0] for line in steps] == ["train", "grpo", "sync", "decode"]
    monkeypatch.setenv("COLUMNS", "200")
    for command, lines in (("train", [grpo["run"]]), ("sft", [train["run"]]), ("compile", steps)):
        assert all(line.startswith(f"deepseek-jax {command} ") for line in lines)
        shown = command_line(import_module(f"deepseek_jax.commands.{command}").main)("--help-all")[1]
        for option in (word for word in " ".join(lines).split() if word.startswith("--")):
            assert option in shown, option


@pytest.mark.parametrize("name", ["memory.png", "memory.html"])
def test_a_chart(name, call, tmp_path):
    assert call("v2-lite", "--chip", "v5e", "--chart", tmp_path / name)[0] == 0
    assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize(
    "arguments, says",
    [
        ((), "wanted a model, --chip or --memory"),
        (("r2", "--chip", "v5e"), f"model: got 'r2', wanted a folder with config.json or one of {', '.join(PRESETS)}"),
        (("tiny", "--chip", "v9"), "chip: got 'v9', wanted one of v4, v5e"),
        (("tiny", "--chip", "v5e", "--chips", "3"), "chips: got 3, wanted for v5e one of 1, 4, 8"),
        (("tiny", "--chip", "v5e", "--context", "9999"), "context: got 9999, wanted 1 to 256"),
        (("r1-671b", "--chips", "8"), "--chips wants --chip"),
        (("r1-671b", "--chart", "x.png"), "--chart wants one model and one --chip"),
        (("r1-671b", "--chip", "v5e", "--chart", "x.gif"), "wanted a name that ends in .png or .html"),
        (("--memory", "24"), "memory: got '24', wanted a number and a unit, such as 24GB"),
        (("--memory", "0GB"), "memory: got '0GB'"),
        (("--memory", "24GB", "--chip", "v5e"), "--memory goes with a model"),
        (("--memory", "24GB", "--dtype", "fp8"), "--dtype with --memory wants a model"),
        (("--memory", "24GB", "--context", "0"), "context: got 0, wanted at least 1"),
        (("tiny", "--chip", "v5e", "--dtype", "int4", "--workload", "train"), "quantized weights are only served"),
        (
            ("tiny", "--chip", "v5e", "--chips", "256", "--workload", "train", "--batch", "3"),
            "mesh: no mesh of v5e x 256",
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, says, call):
    status, text, error = call(*arguments)
    assert (status, text) == (1, "") and error.startswith("error: ") and says in error and error.count("\n") == 1


@pytest.mark.parametrize("option", [("--workload", "sing"), ("--dtype", "fp4"), ("--sing",)])
def test_an_unknown_option_is_refused(option, call):
    assert call("tiny", "--chip", "v5e", *option)[0] == 2


@pytest.mark.parametrize(
    "text, size", [("24GB", 24 * 10**9), ("1.5 GiB", 3 * 2**29), (" 512mb ", 512 * 10**6), ("1TiB", 2**40)]
)
def test_a_memory_is_read(text, size):
    assert read_memory(text) == size


def test_the_script_itself(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "plan.py"), "tiny", "--chip", "v5e", "--json"]
    env = {**os.environ, "JAX_PLATFORMS": "none_such", "PYTHONPATH": str(ROOT)}  # touches no device
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["fits"] is True
