"""Two processes of four devices each give what one of eight does, and end together. What they do is in `laws`."""

import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax import distributed
from deepseek_jax.data.prompts import batches
from deepseek_jax.distributed import environment
from deepseek_jax.report.metrics import read_metrics
from tests.checkpoint.folders import R1, random_folder
from tests.distributed import laws
from tests.distributed.launch import ended, launch, started


def kept(folder: Path, name: str, process: int) -> list[np.ndarray]:
    with np.load(folder / f"{name}.{process}.npz") as found:
        return [found[key] for key in found.files]


def toy_end() -> np.ndarray:
    """The weights of an unbroken run, by one process and one device."""
    weights = np.arange(8, dtype=np.float32)
    data = batches([float(i) for i in range(20)], size=8, seed=0)
    for _ in range(laws.STEPS):
        weights = np.asarray(laws.update(weights, np.asarray(next(data), np.float32)))
    return weights


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype and found.tobytes() == wanted.tobytes()


def steps(folder: Path) -> list[int]:
    return [row["step"] for row in read_metrics(folder / "run")]


def spoken(text: str) -> list[str]:
    """The lines of the program's own. The CPU backend's collectives print too, by threads that mix their pieces."""
    return re.findall("^(?:words|toy).*", text, re.MULTILINE)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_train_as_one_and_only_the_main_one_writes(tmp_path):
    main, other = launch(laws.they_meet_and_agree, tmp_path)
    for process in (0, 1):
        assert_same(kept(tmp_path, "toy", process)[0], toy_end())
        weights, seen = kept(tmp_path, "restored", process)
        assert_same(weights, toy_end())
        assert seen == laws.STEPS
    first, second, *_ = spoken(main.out)
    assert first == "words of the main process" and second.startswith("toy 1/6")
    assert other.out == "" and main.err == other.err == ""
    assert steps(tmp_path) == list(range(1, laws.STEPS + 1))
    events = [path.name for path in (tmp_path / "run" / "tensorboard").rglob("events*")]
    assert sorted(name[-5:] for name in events) == [".0000", ".0001"]  # one a start of the log


@pytest.mark.slow
@pytest.mark.parametrize("who", [0, 1])
def test_an_error_of_one_process_is_told_once_and_ends_the_other(tmp_path, who):
    (tmp_path / "who").write_text(str(who))
    start = time.monotonic()
    found = ended(started(laws.one_fails, tmp_path, processes=2, devices=4))
    assert time.monotonic() - start < 60
    assert found[who].status == 1
    assert found[who].err == f"error: process {who}: the data of this process are bad\n"
    assert found[1 - who].status == distributed.PEER_ENDED == 75
    said = f"error: process {1 - who}: process {who} ended, so this one does too; its own output says why\n"
    assert found[1 - who].err == said


@pytest.mark.slow
def test_a_killed_process_ends_the_other_whatever_that_one_does(tmp_path):
    """Here it sleeps. jax.distributed would notice after a minute, the law would end after a hundred seconds."""
    start = time.monotonic()
    main, other = ended(started(laws.one_is_killed_while_the_other_waits, tmp_path, processes=2, devices=4))
    assert time.monotonic() - start < 45
    assert (main.status, other.status) == (75, -9)
    assert main.err == "error: process 0: process 1 ended, so this one does too; its own output says why\n"


@pytest.mark.slow
def test_a_stage_of_which_a_process_was_killed_ends_as_an_unbroken_one(tmp_path):
    main, other = ended(started(laws.one_is_killed, tmp_path, processes=2, devices=4))
    assert (main.status, other.status) == (75, -9)
    (line,) = main.err.splitlines()
    assert line.startswith("error: process 0: process 1 ended, so this one does too")
    assert steps(tmp_path) == [1, 2, 3]
    assert len(list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))) == 1  # the main process's
    main, _ = launch(laws.one_is_killed, tmp_path)
    assert "toy: going on after step 2 of 6" in main.out
    assert_same(kept(tmp_path, "toy", 0)[0], toy_end())
    assert steps(tmp_path) == list(range(1, laws.STEPS + 1))


@pytest.mark.slow
def test_sigterm_of_one_process_saves_and_ends_both(tmp_path):
    main, other = ended(started(laws.one_gets_sigterm, tmp_path, processes=2, devices=4))
    assert main.status == other.status == distributed.PREEMPTED == 143
    assert "toy: got SIGTERM, saved step 4 of 6; the same command goes on from there" in main.out
    assert main.err == other.err == other.out == ""
    main, _ = launch(laws.one_gets_sigterm, tmp_path)
    assert "toy: going on after step 4 of 6" in main.out
    assert_same(kept(tmp_path, "toy", 0)[0], toy_end())
    assert steps(tmp_path) == list(range(1, laws.STEPS + 1))


@pytest.mark.slow
def test_a_run_of_two_processes_goes_on_in_one(tmp_path):
    """And on other devices."""
    ended(started(laws.one_gets_sigterm, tmp_path, processes=2, devices=4))
    launch(laws.one_gets_sigterm, tmp_path, processes=1, devices=8)
    assert_same(kept(tmp_path, "toy", 0)[0], toy_end())


@pytest.mark.slow
def test_two_processes_convert_as_one(tmp_path):
    """The manifest and what lies beside the weights, byte for byte; the weights, by their exports."""
    random_folder(tmp_path / "one" / "hf", R1, shards=3)
    shutil.copytree(tmp_path / "one" / "hf", tmp_path / "two" / "hf")
    for path in (tmp_path / "one" / "hf").iterdir():  # an unchanged source has its times
        shutil.copystat(path, tmp_path / "two" / "hf" / path.name)
    launch(laws.a_folder_is_converted, tmp_path / "one", processes=1, devices=8)
    launch(laws.a_folder_is_converted, tmp_path / "two")
    one, two = (content(tmp_path / name / "converted") for name in ("one", "two"))
    beside = {name for name in one if not name.startswith("weights/")}
    assert {"manifest.json", "config.json", "source/model.safetensors.index.json"} <= beside
    for name in beside:
        assert two[name] == one[name], name
    # TensorStore names its data files at random
    assert {name for name in two if "/d/" not in name} == {name for name in one if "/d/" not in name}
    assert content(tmp_path / "two" / "exported") == content(tmp_path / "two" / "hf")
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["converted", "exported", "hf"]


@pytest.mark.slow
def test_damage_that_one_process_finds_stops_both_and_leaves_nothing(tmp_path):
    random_folder(tmp_path / "hf", R1, shards=1)
    opened = laws.open_folder(tmp_path / "hf")
    everything = list(laws.convert.by_unit(opened.arrays).items())
    tensor = everything[1][1][0].tensors[0].name  # of the second unit, which is the second process's
    with (tmp_path / "hf" / "model.safetensors").open("r+b") as file:
        file.seek(opened.stored.entries[tensor].start)
        file.write(b"\x7f\x7f" if opened.stored.entries[tensor].dtype == "F8_E4M3" else b"\xff\xff\xff\xff")
    main, other = ended(started(laws.a_damaged_folder_is_not_converted, tmp_path, processes=2, devices=4))
    assert main.status == other.status == 1
    problem = f"tensor {tensor!r} holds NaN or infinite values; the checkpoint is damaged"
    assert other.err.startswith("error: process 1: ") and problem in other.err
    assert main.err.startswith("error: process 0: process 1: ") and problem in main.err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.slow
def test_a_conversion_of_which_a_process_was_killed_goes_on(tmp_path):
    random_folder(tmp_path / "hf", R1, shards=2)
    main, other = ended(started(laws.a_conversion_is_killed, tmp_path, processes=2, devices=4))
    assert (main.status, other.status) == (75, -9)
    partial = tmp_path / ".converted.partial"
    notes = {note.name: note.stat().st_mtime_ns for note in partial.glob("*.done")}
    assert notes and not (tmp_path / "converted").exists()
    launch(laws.a_folder_is_converted, tmp_path)
    assert content(tmp_path / "exported") == content(tmp_path / "hf") and not partial.exists()


@pytest.mark.slow
def test_two_processes_train_a_model_and_answer_as_one(tmp_path):
    """The weights after four steps to 1e-6, for sums over devices come in another order; the same greedy answers."""
    launch(laws.a_model_is_trained_and_asked, tmp_path / "one", processes=1, devices=8)
    launch(laws.a_model_is_trained_and_asked, tmp_path / "two")
    (one,) = (kept(tmp_path / "one", "weights", process) for process in (0,))
    first, second = (kept(tmp_path / "two", "weights", process) for process in (0, 1))
    assert len(one) == len(first) == len(second) > 20
    for a, b, c in zip(one, first, second, strict=True):
        assert_same(c, b)
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-6)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name / "run")] for name in ("one", "two")]
    assert len(losses[0]) == 4
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-6)
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/answers.*.json"))]
    assert len(answers) == 3 and answers[0] == answers[1] == answers[2]


@pytest.mark.slow
def test_two_processes_run_an_engine_as_one(tmp_path):
    launch(laws.an_engine_answers, tmp_path / "one", processes=1, devices=8)
    launch(laws.an_engine_answers, tmp_path / "two")
    answers = [json.loads(path.read_text()) for path in sorted(tmp_path.glob("*/tokens.*.json"))]
    assert len(answers) == 3 and answers[0] == answers[1] == answers[2] and len(answers[0]) == 12


# --- in one process ----------------------------------------------------------------------------------

EXPLICIT = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
SLURM = {
    **{"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "2", "SLURM_LOCALID": "2"},
    "SLURM_STEP_NODELIST": "node[1-2]",
}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        (EXPLICIT, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}, None),
        ({**EXPLICIT, **SLURM}, {"coordinator_address": "10.0.0.1:1234", "num_processes": 4, "process_id": 3}),
        (SLURM, {}),
        ({**SLURM, "SLURM_NTASKS": "1"}, None),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, None),  # sbatch's own script
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, {}),
    ],
)
def test_the_environment_says_how_many_there_are(variables, found):
    assert environment.initialize_arguments(variables) == found


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        (
            {"JAX_PROCESS_ID": "0"},
            "JAX_COORDINATOR_ADDRESS: not set, wanted JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES",
        ),
        ({**EXPLICIT, "JAX_PROCESS_ID": ""}, "JAX_PROCESS_ID: not set, wanted .* together; set all three, or none"),
        ({**EXPLICIT, "JAX_PROCESS_ID": "4"}, "JAX_PROCESS_ID: got 4, wanted less than JAX_NUM_PROCESSES, which is 4"),
        ({**EXPLICIT, "JAX_NUM_PROCESSES": "four"}, "JAX_NUM_PROCESSES: got 'four', wanted a whole number"),
        ({**EXPLICIT, "JAX_COORDINATOR_ADDRESS": "10.0.0.1"}, "got '10.0.0.1', wanted HOST:PORT of process 0"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_LOCALID"}, "SLURM_LOCALID: not set, though SLURM_NTASKS is 8"),
    ],
)
def test_variables_that_are_half_set_are_refused(variables, says):
    with pytest.raises(ValueError, match=says):
        environment.initialize_arguments(variables)


@pytest.mark.parametrize(
    ("hosts", "platforms", "found"), [(2, "", {}), (1, "", None), (2, "cpu", None), (2, "tpu", {})]
)
def test_a_tpu_pod_is_recognised_by_its_hosts(hosts, platforms, found, monkeypatch):
    """Where libtpu is installed and chips are there, which this test pretends."""
    from jax._src.clusters import GkeTpuCluster

    monkeypatch.setattr(environment, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(GkeTpuCluster, "is_env_present", lambda: True)
    monkeypatch.setattr(GkeTpuCluster, "get_process_count", lambda: hosts)
    assert environment.initialize_arguments({"JAX_PLATFORMS": platforms}) == found


def test_one_process_is_the_main_one_and_waits_for_nobody():
    assert (distributed.process_index(), distributed.process_count(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.all_gather_objects({1: (2,)}) == [{1: (2,)}]
    assert distributed.on_main(lambda: (1, 2)) == (1, 2)
    with pytest.raises(KeyError), distributed.together():
        raise KeyError
