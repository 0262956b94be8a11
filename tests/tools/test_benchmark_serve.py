"""tools/benchmark_serve.py: that streams which are lost or mixed up are noticed, and a thousand that are not."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tools.benchmark_serve import _print_latencies, chunks, overhead, streams, told
from tools.serve_load import processor_seconds, read


def event(**delta) -> bytes:
    data = b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n"
    return b"%x\r\n%s\r\n" % (len(data), data)


HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
PARTS = [HEAD, event(role="assistant", content=""), event(reasoning_content="a"), event(content="b\n\nc"), END]


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_is_read_whatever_its_pieces(size):
    sent = b"".join(PARTS)
    found = read([(float(at), sent[at : at + size]) for at in range(0, len(sent), size)])
    assert found.whole == ("a", "b\n\nc") and found.ended and found.problem is None
    assert len(found.times) == (1 if size == 1000 else 2)
    told([found], [("a", "b\n\nc")], [0])


@pytest.mark.parametrize(
    "sent, problem",
    [
        (b"".join(PARTS[:-1]), "no end"),
        (b"".join(PARTS), "wanted"),
        (b'HTTP/1.1 503 Service Unavailable\r\n\r\n{"error": {"message": "full"}}', "status 503"),
        (HEAD + b'f\r\ndata: {"error": {"message": "it died"}}\n\n\r\n' + END, "it died"),
    ],
)
def test_one_that_is_not_whole_or_not_its_own_is_noticed(sent, problem):
    with pytest.raises(ValueError, match=problem):
        told([read([(0.0, sent)])], [("a", "another")], [0])


def test_an_answer_without_text_has_no_latencies(capsys):
    reads = [read([(float(at), part) for at, part in enumerate(parts)]) for parts in (PARTS, [HEAD, END])]
    told(reads, [("a", "b\n\nc"), ("", "")], [0, 1])
    _print_latencies("two", reads)
    assert capsys.readouterr().out == "| two | 2.00 | 2.00 | 1000.0 | 1000.0 |\n"


def test_processor_time_is_that_of_a_process_and_of_its_children():
    """Two that compute, one of them a child of the other; what waits takes none."""
    code = (
        "import sys, time; print(flush=True)\nwhile time.process_time() < 0.3: pass\nprint(flush=True); time.sleep(60)"
    )
    both = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {code!r}]); exec({code!r})"
    child = subprocess.Popen([sys.executable, "-c", both], stdout=subprocess.PIPE)
    with child:
        for _ in range(4):
            child.stdout.readline()
        before = processor_seconds(child.pid)
        time.sleep(0.1)
        after = processor_seconds(child.pid)
        subprocess.run(["pkill", "-P", str(child.pid)], check=True)
        child.kill()
    assert 0.5 < before < 1.5 and after - before < 0.05 and processor_seconds(os.getpid()) > 0


def test_a_servers_own_time_is_told_by_chunk_and_request(capsys):
    chunks(requests=2, slots=2, seconds=0.001, rounds=1)
    assert re.search(r"\| a chunk of 4 tokens \| -?\d+ .*\n\| a request \| -?\d+ ", capsys.readouterr().out)


@pytest.mark.slow
def test_what_a_server_takes_beside_its_engine_is_told(capsys):
    overhead(requests=6, tokens=8, slots=2, rounds=1)
    rows = capsys.readouterr().out.splitlines()[-2:]
    assert [row.split("|")[1].strip() for row in rows] == ["bare engine", "server"]
    assert all(row.count("(") == 5 for row in rows) and rows[0].count("1.00 (1.00 to 1.00)") == 2


@pytest.mark.slow
def test_a_thousand_streams_of_which_a_third_goes_are_neither_lost_nor_mixed_up(capsys):
    """sglang-jax#1092: 10 to 18 % of streams failed in a race. Memory, blocks and files are back at their level."""
    streams(requests=1000, tokens=8, slots=64, rounds=1)
    printed = capsys.readouterr().out
    assert "Of 1000 streams 334 were dropped and 33 read slowly" in printed and "blocks in use 0 and 0" in printed
