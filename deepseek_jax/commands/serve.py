"""Serve a model over HTTP: OpenAI's API, /v1/reasoning, metrics, and a page to chat on."""

import dataclasses
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from deepseek_jax import distributed
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.generate import layout_of, within_memory
from deepseek_jax.commands.options import command
from deepseek_jax.commands.serve_settings import COMMON, MADE, Config
from deepseek_jax.distributed import printable, say
from deepseek_jax.distributed.orders import Following, Leading
from deepseek_jax.generation.engine import Engine
from deepseek_jax.generation.generator import sizes_that_pay
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.serve.settings import ServeConfig
from deepseek_jax.text.tokenizer import Tokenizer

_NEEDED = ("fastapi", "uvicorn", "prometheus_client", "limits", "llguidance")


@command(Config, common=COMMON, deciding=(), defaults=lambda given: Config())
def main(config: Config) -> None:
    """Serve MODEL until SIGTERM, which lets answers finish, or Ctrl-C.

    /health says that the process lives, /ready that everything is compiled. Notes and a line of JSON for each request
    go to stderr.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise ValueError(f"serve: {', '.join(missing)} not installed; pip install 'deepseek_jax[serve]'")
    model = _asked(config)
    folder = model_folder(model)
    if distributed.is_main():
        _lead(config, folder, config.http.serving(Path(model).resolve().name))
    else:
        _follow(config, folder)


def _lead(config: Config, folder: Path, settings: ServeConfig) -> None:
    """Answer; other processes, where there are any, take the same steps."""
    from deepseek_jax.serve.server import Process, listen  # what it needs is installed

    listener, leading = listen(config.http.host, config.http.port), None
    with listener:
        if distributed.process_count() > 1:  # a SIGTERM to any of them is one to this
            leading = Leading(partial(os.kill, os.getpid(), signal.SIGTERM))
        engine = engine_of(config, folder, give=None if leading is None else leading.give)
        where = f"http://{config.http.host}:{listener.getsockname()[1]}"
        _note(f"{settings.names[0]} at {where}, ready when {where}/ready says so")
        if not settings.api_keys and settings.allowed_hosts is None:
            say("no --api-key: whoever reaches this port is answered", kind="warning")
        process = Process(engine, settings)
        process.run(listener)
    if process.served.engine.runs or not process.served.engine.ready:
        distributed.leave(0)  # the interpreter's own end would wait for the compiler, and so would other processes
    if leading is not None:
        leading.close()


def _follow(config: Config, folder: Path) -> None:
    """Take the steps of the main process."""
    from deepseek_jax.serve.lockstep import follow

    orders = Following()
    follow(engine_of(config, folder), orders, orders.ask_to_end)


def _asked(config: Config) -> Path:
    """The model to serve."""
    if config.model is not None:
        return config.model
    if not MADE.is_dir():
        raise ValueError(f"MODEL: got none, and there is no {MADE}; name a model, or make one with deepseek-jax train")
    _note(f"no MODEL given: serving {MADE}")
    return MADE


def engine_of(config: Config, folder: Path, give: Callable[[list], None] | None = None) -> Engine:
    """The engine over a folder's model.

    Args:
        config: the command's.
        folder: the model's.
        give: tells the other processes what is asked of the engine; None where nobody follows it.
    """
    from deepseek_jax.serve.lockstep import LeadingEngine
    from deepseek_jax.serve.prompts import chats

    make = Engine if give is None else partial(LeadingEngine, give=give)
    tokenizer, model = Tokenizer.from_folder(folder), load_config(folder)
    if not tokenizer.eos_ids:
        say(f"{folder}: names no end-of-sequence token; answers end at their limits alone", kind="warning")
    if not chats(tokenizer):
        say(f"{folder}: has no chat template; /v1/completions alone answers", kind="warning")
    several = distributed.process_count() > 1
    layout, dtype = layout_of(model, every=several, **config.engine.mesh), dtype_of(config.engine.dtype)
    wanted = config.engine.engine
    wanted.of_scheduler(model, layout, dtype)  # refuses what the model cannot do, before it is loaded
    loaded = load_model(folder, dtype=dtype, layout=layout, quantization=config.engine.quantization)
    found = within_memory(wanted, model, layout, dtype)
    found = dataclasses.replace(found, batch_sizes=sizes_that_pay(loaded.weights, found.max_num_seqs))
    return make(loaded.config, loaded.graphdef, loaded.weights, found, tokenizer=tokenizer)


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
