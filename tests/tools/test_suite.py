"""tools/benchmark.py: who is measured when, what a row says of its seconds, and what is written."""

import json
import multiprocessing
import os
import signal
import sys
import time

import pytest

from tools import benchmark
from tools.suite import kernel_cases
from tools.suite.apart import ProcessDied, apart
from tools.suite.case import Case, Row, Work, beyond_the_first, measured
from tools.suite.grpo_steps import repeated
from tools.suite.model_cases import QUICK, Sizes
from tools.suite.table import as_json, machine, markdown, plot, spread


def row(**changed):
    given = dict(suite="decode", name="batch 1", unit="tokens", amount=100.0, ours=[2.0, 1.0, 4.0], peer_name="peer")
    given |= dict(peer=[4.0, 3.0, 4.0], alone="", flops=1e9, nbytes=4e9, flops_rate=[1e9] * 3, bandwidth=[4e9] * 3)
    return Row(**given | changed)


def case(log, **changed):
    def taking(name, seconds):
        def once():
            log.append(name)
            return next(seconds)

        return once

    given = dict(suite="s", name="n", unit="tokens", amount=10, work=Work(8.0, 4.0))
    given |= dict(
        ours=taking("ours", iter([99, 1, 2, 3])), peer=taking("peer", iter([99, 4, 6, 12])), peer_name="theirs"
    )
    return Case(**given | changed)


def ceilings(log):
    def rate(dtype):
        log.append(dtype)
        return 8.0

    return {"flops_rate": rate, "bandwidth": lambda dtype: 8.0}


def test_all_take_turns_and_the_first_round_does_not_count():
    log = []
    found = measured(case(log), ceilings(log), 3)
    assert found.ours == [1, 2, 3] and found.peer == [4, 6, 12]
    assert log[:2] == ["ours", "peer"]
    rounds = [log[2 + 3 * n : 5 + 3 * n] for n in range(3)]
    assert rounds == [["float32", "ours", "peer"], ["float32", "peer", "ours"], ["float32", "ours", "peer"]]
    assert found.ratios == [4, 3, 4]


def test_a_case_without_a_peer_says_why():
    log = []
    found = measured(case(log, peer=None, alone="torch not installed"), ceilings(log), 2)
    assert found.ratios == [] and found.peer == []
    assert "| - | torch not installed |" in markdown([found], machine())


@pytest.mark.parametrize(
    ("flops", "nbytes", "seconds", "bound"),
    [
        (1e9, 1e9, 1.1, "products"),
        (1e9, 1e9, 2.5, "neither; products first"),
        (1e8, 4e9, 1.1, "memory"),
        (1e8, 4e9, 2.1, "neither; memory first"),
        (0, 0, 1.0, "no closed form"),
    ],
)
def test_what_bounds_a_row(flops, nbytes, seconds, bound):
    assert row(flops=flops, nbytes=nbytes, ours=[seconds] * 3).bound == bound


def test_the_share_is_of_the_ceilings_of_the_same_round():
    found = row(ours=[2.0, 1.0, 4.0], flops_rate=[1e9, 2e9, 1e9], bandwidth=[4e9, 8e9, 2e9])
    assert found.shares == [0.5, 0.5, 0.5]
    assert found.rate == 50.0


def test_a_table_has_ratio_spread_share_and_bound():
    line = markdown([row()], machine()).splitlines()[-1]
    wanted = ["decode", "batch 1", "50.0 tokens/s", "2.00 (1.00 to 3.00)", "peer", "50 %", "memory"]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:6] == wanted[:6] and cells[6] in ("memory", "products")


def test_json_holds_every_round():
    told = json.loads(as_json([row()], machine()))
    assert told["rows"][0]["ours"] == [2.0, 1.0, 4.0] and told["rows"][0]["ratios"] == [2.0, 3.0, 1.0]
    assert told["machine"]["versions"]["jax"]


def test_a_plot_of_rows_with_and_without_a_peer(tmp_path):
    plot([row(), row(peer=[], peer_name=""), row(flops=0.0, nbytes=0.0)], tmp_path / "plot.svg")
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")


def test_decode_leaves_the_first_token_out():
    asked = []
    once = beyond_the_first(asked.append, 5)
    assert once() > 0 and asked == [1, 5]


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00 to 3.00)"


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: got 0, wanted at least 1"):
        benchmark.main(rounds=0)


def test_a_text_is_repeated_to_a_length():
    class Letters:
        def encode(self, text, add_bos):
            return list(text)

    assert repeated("ab ", 7, Letters()) == "ab ab ab "


def test_the_kernels_are_measured_beside_something(monkeypatch):
    monkeypatch.setattr(kernel_cases, "why_none", lambda *packages: "torch is not for default tests")
    rows = list(benchmark.measured_rows("kernels", QUICK, None, None, 1, quick=True))
    assert len(rows) == 6 and all(row.flops > 0 and row.nbytes > 0 for row in rows)


@pytest.mark.parametrize("name", benchmark.SUITES)
def test_sizes_of_each_case_alone_are_those_of_all(name):
    held = {"decode": "batches", "prefill": "prefill", "grpo": "grpo_prompts"}.get(name)
    parts = Sizes().each(name)
    if held is None:
        assert parts == [Sizes()]
    else:
        assert sum((getattr(part, held) for part in parts), ()) == getattr(Sizes(), held)
        assert all(len(getattr(part, held)) == 1 and held in str(part) for part in parts)


def numbers(upto, then):
    yield from range(upto)
    match then:
        case "raise":
            raise ValueError(f"{os.getpid()}: not so")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "leave":
            sys.exit(3)
        case "wait":
            time.sleep(600)


@pytest.mark.parametrize(
    ("then", "said", "kind"),
    [
        ("raise", "not so", ValueError),
        ("die", "killed, most likely for want of memory", ProcessDied),
        ("leave", "ended with status 3", ProcessDied),
    ],
)
def test_what_a_process_gave_before_its_end_is_kept(then, said, kind):
    found = []
    with pytest.raises(kind, match=said) as caught:
        for number in apart(numbers, 3, then):
            found.append(number)
    assert found == [0, 1, 2] and str(os.getpid()) not in str(caught.value)


def test_a_process_ends_with_what_reads_it():
    reading = apart(numbers, 1, "wait")
    assert next(reading) == 0
    (process,) = multiprocessing.active_children()
    reading.close()
    assert not process.is_alive() and list(apart(numbers, 2, "")) == [0, 1]


def test_a_case_whose_process_dies_is_told_and_the_others_are_measured(monkeypatch, capsys, tmp_path):
    def apart(function, *given):
        if function is not benchmark.measured_rows:
            yield from function(*given)
            return
        name, sizes, *_ = given
        yield row(suite=name, name=str(sizes))
        if sizes.batches == (8,):
            raise ProcessDied("killed")

    monkeypatch.setattr(benchmark, "apart", apart)
    with pytest.raises(ChildProcessError, match="processes of 1 cases died"):
        benchmark.main(suite=("decode", "train"), rounds=1, output=tmp_path)
    told = capsys.readouterr()
    assert "error: decode, batches=(8,): killed" in told.err
    assert [line.split("|")[1].strip() for line in told.out.splitlines()[-4:]] == ["decode"] * 3 + ["train"]
    assert len(json.loads((tmp_path / "rows.json").read_text())["rows"]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("name", benchmark.SUITES)
def test_every_suite_runs_on_a_tiny_model(name, capsys):
    benchmark.main(suite=(name,), rounds=1, quick=True, json=True)
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows and all(row["suite"] == name and row["rate"] > 0 for row in rows)
    assert all(row["ratios"] or row["alone"] for row in rows)
