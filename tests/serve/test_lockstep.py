"""A server over several processes: the others are told what the main one was asked, and then run the same."""

import json
import os
import signal
import subprocess
import sys

import pytest

from deepseek_jax.generation.engine_config import EngineConfig
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.serve.lockstep import LeadingEngine, follow
from deepseek_jax.serve.structured import Grammars
from tests.distributed.launch import free_port
from tests.flags import environment
from tests.serve.client import OPENING, tokenizer
from tests.serve.conftest import SMALL, model
from tests.serve.test_engine_serving import SCHEMA
from tests.serve.test_process import CHAT, FEW, ROOT, Server

pytestmark = pytest.mark.usefixtures("quick_compilation")


def told(updates) -> list:
    return [(of.id, of.tokens, of.text, of.finished, of.live.logprobs) for of in updates]


def test_an_engine_that_follows_takes_the_same_steps(make_engine, monkeypatch):
    """Of all that a request may have, of one that is refused, and of one that is cancelled; through JSON, as sent."""
    monkeypatch.setattr(signal, "signal", lambda *of: None)
    orders, led, followed = [], [], []
    settings = EngineConfig(**SMALL | {"num_blocks": 60, "admission": "preempt"})
    leading = LeadingEngine(*model(), settings, tokenizer=tokenizer(OPENING), give=lambda of: orders.append(of))
    for _ in leading.warm_up():
        pass
    grammar = Grammars(leading.tokenizer, leading.config.vocab_size).of_schema(SCHEMA)
    kinds = [
        dict(temperature=0.7, top_p=0.9, stop=["7"], stop_ids=(2,)),
        dict(logit_bias={5: 2.5, 40: -100.0}, presence_penalty=0.5, repetition_penalty=1.1),
        dict(thinking_budget=3, top_logprobs=2),
        dict(thinking_budget=4, logit_bias={2: -30.0}),
        dict(temperature=0, prompt_logprobs=True, min_new_tokens=3),
    ]
    prompts = [leading.tokenizer.chat([{"role": "user", "content": "1+2" * n}]) for n in range(1, 9)]
    for number, prompt in enumerate(prompts):
        kind = kinds[number % len(kinds)]
        constraint = grammar.copy() if number % len(kinds) == 3 else None
        leading.add(prompt, SamplingConfig(max_new_tokens=20, **kind), seed=number, salt="s", constraint=constraint)
        led.append(told(leading.step()))
    with pytest.raises(ValueError):  # nobody is told, nor does it leave a number out
        leading.add(prompts[0] * 50, SamplingConfig(max_new_tokens=5, thinking_budget=1), seed=0)
    leading.cancel(6)
    while leading.has_work:
        led.append(told(leading.step()))
    other = make_engine(num_blocks=60, admission="preempt")
    step = other.step
    monkeypatch.setattr(other, "step", lambda: followed.append(told(step())))
    follow(other, json.loads(json.dumps(orders)), lambda: None)
    assert followed == led and len(led) > 10 and not other.has_work


def servers(folder, *words):
    """A server of two processes, four devices each; the main one, and the other."""
    place = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    place |= environment(4) | {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, "tools/serve.py", str(folder), *map(str, words)]
    own = os.environ | place | {"PYTHONPATH": str(ROOT), "JAX_PROCESS_ID": "1"}
    other = subprocess.Popen(command, cwd=ROOT, env=own, stderr=subprocess.PIPE, text=True)
    return Server(folder, *words, more=place | {"JAX_PROCESS_ID": "0"}), other


def answers(server) -> list:
    """Of a few calls, a stream and a schema among them."""
    asked = [dict(seed=number, max_tokens=12, logprobs=True) for number in range(3)]
    form = {"type": "json_schema", "json_schema": {"schema": SCHEMA}}
    asked.append(dict(seed=5, max_tokens=80, response_format=form, thinking={"type": "enabled", "budget_tokens": 3}))
    found = []
    for each in asked:
        reply = json.loads(server.ask("POST", "/v1/chat/completions", CHAT | {"stream": False} | each).read())
        choice = reply["choices"][0]
        found.append([choice["message"], choice["finish_reason"], reply["usage"]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("told, mesh", [(0, ()), (1, ("--mesh-data", "4", "--mesh-tensor", "2"))])
def test_two_processes_answer_as_one_and_end_together(model_folder, told, mesh):
    """A SIGTERM to either lets the answers finish."""
    with Server(model_folder, *FEW) as alone:
        alone.wait_until_ready()
        expected = answers(alone)
    server, other = servers(model_folder, *FEW, *mesh)
    with server, other:
        server.wait_until_ready()
        assert answers(server) == expected
        running = server.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 100})
        assert running.status == 200 and running.read(10)
        (server.child, other)[told].send_signal(signal.SIGTERM)
        assert running.read().endswith(b"data: [DONE]\n\n")
        assert server.end() == 0 and other.wait(60) == 0, other.stderr.read()


@pytest.mark.slow
def test_the_end_of_one_ends_the_server(model_folder):
    server, other = servers(model_folder, *FEW)
    with server, other:
        server.wait_until_ready()
        other.kill()
        assert server.end() == 75
