"""The server as a process of its own: how it starts, is asked over a socket, and ends."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest

from deepseek_jax.commands.serve import main
from deepseek_jax.commands.serve_settings import Config
from deepseek_jax.commands.settings_file import read_settings
from tests.flags import environment

ROOT = Path(__file__).resolve().parents[2]
FEW = ["--port", "0", "--max-num-seqs", "2", "--max-model-len", "160", "--max-num-batched-tokens", "32"]
CHAT = {"messages": [{"role": "user", "content": "1"}], "stream": True, "logit_bias": {"2": -100}}
DYING = """
import sys
from deepseek_jax.__main__ import main
from deepseek_jax.generation.engine import Engine
step, seen = Engine.step, []
def dies(self):
    seen.append(1)
    if len(seen) > 5:
        raise MemoryError("no more of it")
    return step(self)
Engine.step = dies
main("serve")
"""


@pytest.fixture(autouse=True)
def ctrl_c_raises():
    """As in a terminal; what a shell starts in the background ignores it, and so would its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Server:
    """A process that serves; what it says on stderr is in `said`."""

    def __init__(self, *words: object, code: str | None = None, more: Mapping[str, str] = MappingProxyType({})):
        program = ["tools/serve.py"] if code is None else ["-c", code]
        self.child = subprocess.Popen(
            [sys.executable, *program, *map(str, words)],
            cwd=ROOT,
            env=os.environ | environment(1) | {"PYTHONPATH": str(ROOT)} | more,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.said: list[str] = []
        self._reader = threading.Thread(target=lambda: self.said.extend(iter(self.child.stderr.readline, "")))
        self._reader.start()

    def __enter__(self):
        return self

    def __exit__(self, *of):
        self.child.kill()
        self.child.wait()
        self._reader.join()
        self.child.stderr.close()

    @property
    def port(self) -> int:
        return int(re.search(r"http://127\.0\.0\.1:(\d+)", "".join(self.said))[1])

    def wait_until_ready(self) -> None:
        self.until(lambda: any("ready when" in line for line in self.said))
        self.until(lambda: self.ask("GET", "/ready").status == 200)

    def until(self, condition, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end and self.child.poll() is None, self.said
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: dict | None = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        text = None if body is None else json.dumps(body)
        connection.request(method, path, text, {"Content-Type": "application/json"} if text else {})
        return connection.getresponse()

    def end(self, seconds: float = 60) -> int:
        status = self.child.wait(timeout=seconds)
        self._reader.join()
        return status


@pytest.mark.slow
def test_a_sigterm_lets_answers_finish_and_ends_with_0(model_folder):
    with Server(model_folder, *FEW) as server:
        server.wait_until_ready()
        assert server.ask("GET", "/health").status == 200
        answer = server.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 120})
        assert answer.status == 200 and answer.read(10)
        server.child.send_signal(signal.SIGTERM)
        assert answer.read().endswith(b"data: [DONE]\n\n")
        assert server.end() == 0
    about = json.loads(server.said[-1])
    assert about["path"] == "/v1/chat/completions" and about["completion_tokens"] == 120
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=2)


@pytest.mark.slow
def test_an_engine_that_dies_ends_the_process_with_its_reason(model_folder):
    with Server(model_folder, *FEW, code=DYING) as server:
        server.wait_until_ready()
        answer = server.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 120})
        assert b"error" in answer.read()
        assert server.end() == 1
    assert any(line == "error: the engine has ended: MemoryError: no more of it\n" for line in server.said)


@pytest.mark.slow
@pytest.mark.parametrize("when", ["ready", "compiling"])
def test_ctrl_c_ends_it_at_once(model_folder, when):
    with Server(model_folder, *FEW) as server:
        if when == "ready":
            server.wait_until_ready()
            answer = server.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 120})
            assert answer.status == 200
        else:
            server.until(lambda: any("ready when" in line for line in server.said))
            assert server.ask("GET", "/ready").status == 503
        server.child.send_signal(signal.SIGINT)
        assert server.end(20) == 130
    assert not any("Traceback" in line for line in server.said), "".join(server.said)


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(model_folder, command_line, monkeypatch):
    loaded = []
    monkeypatch.setattr("deepseek_jax.commands.serve.load_model", lambda *of, **how: loaded.append(of))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, _, said = command_line(main)(model_folder, "--port", taken.getsockname()[1])
    assert status == 1 and said.count("\n") == 1 and "choose another --port" in said and not loaded


@pytest.mark.parametrize(
    "words, said",
    [
        (["--port", "70000"], "port: got 70000, wanted 0 (any) to 65535"),
        (["--rate-limit", "often"], "rate_limit: got 'often', wanted one such as \"60/minute\""),
        (["--api-key", "short"], "api_keys: got 1 keys, wanted keys of at least 8 characters"),
        (["--max-model-len", "100000"], "max_model_len: got 100000, wanted 1 to 192"),
        (["--gpu-memory-utilization", "2"], "gpu_memory_utilization: got 2.0, wanted more than 0, at most 1"),
        (["--speculate", "mtp"], "drafts: got"),
        (["--tensor-parallel-size", "3"], "mesh: expert 1 x tensor 3 do not divide the 1 devices"),
        (["--mesh-data", "2", "--mesh-tensor", "3"], "mesh: data 2 x expert 1 x tensor 3 do not divide the 1 devices"),
    ],
)
def test_a_setting_that_cannot_be_is_one_line(model_folder, command_line, words, said):
    status, _, error = command_line(main)(model_folder, "--port", "0", *words)
    assert status == 1 and said in error and error.count("\n") == 1


@pytest.mark.parametrize("name", ["mesh_tensor", "mesh-tensor", "tensor_parallel_size", "tensor-parallel-size"])
def test_a_file_of_settings_may_have_vllms_name_of_the_mesh(tmp_path, name):
    file = tmp_path / "settings.yaml"
    file.write_text(f"{name}: 4\nmesh_data: 2\n")
    assert read_settings(file, Config) == {"mesh_tensor": 4, "mesh_data": 2}
    file.write_text(f"{name}: 4\n{'mesh_tensor' if 'size' in name else 'tensor_parallel_size'}: 2\n")
    with pytest.raises(ValueError, match="is there twice"):
        read_settings(file, Config)


def test_without_a_model_the_one_that_training_made_is_served(command_line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, _, error = command_line(main)("--port", "0")
    assert status == 1 and "there is no runs/r1_zero/model" in error and error.count("\n") == 1
    (tmp_path / "runs/r1_zero/model").mkdir(parents=True)
    status, _, error = command_line(main)("--port", "0")
    assert status == 1 and error.startswith("no MODEL given: serving runs/r1_zero/model\n")
