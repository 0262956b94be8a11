"""A teacher's samples: drawn once, kept as they come, and those to learn from written as rows."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import read_json, write_whole
from deepseek_jax.checkpoint.fingerprint import fingerprint
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import load_config
from deepseek_jax.commands.distill_settings import Config
from deepseek_jax.data.prompts import PromptData, open_prompts
from deepseek_jax.evals.drawing import Drawer, Drawn, EngineDrawer, Wanted
from deepseek_jax.evals.samples import Key, Samples, json_line
from deepseek_jax.evals.server import ServerDrawer
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.text import Messages, seeds_for
from deepseek_jax.model.precision import dtype_of
from deepseek_jax.report.progress import Progress
from deepseek_jax.text.think import OPEN, opens_thought
from deepseek_jax.text.tokenizer import Tokenizer
from deepseek_jax.train.runs import write_json

SETTINGS, ROWS = "teacher.json", "rows.jsonl"
_NAME = "teacher"


class Taught(NamedTuple):
    """What a teacher wrote: the rows' file, what it is known by, and the numbers of its samples."""

    rows: Path
    teacher: str
    counts: dict[str, Any]


def teach(config: Config) -> Taught:
    """Draw what is not there yet, and write the rows to learn from. A kill loses the samples that were being drawn.

    Raises:
        ValueError: samples of other settings, a teacher that cannot be reached, no prompts, or no sample to learn from.
    """
    if distributed.process_count() > 1:
        raise ValueError("teacher: got several processes, wanted one to draw its text, or --teacher-samples FILE")
    by = config.taught_by
    data = prompts_of(config)
    asked = questions(config, data)
    server = None if by.server is None else _server(config)
    folder = None if server is not None else model_folder(by.teacher[0])
    teacher = fingerprint(folder) if server is None else server.model
    now = {"teacher": teacher, **_told(config), "data": [[of["digest"], of["choice"]] for of in data.identity()]}
    _check(config.output / SETTINGS, now)
    held = Samples(config.output)
    keys = [Key(_NAME, number, sample) for number in range(len(asked)) for sample in range(config.asked.samples)]
    missing = [key for key in keys if held.get(key) is None]
    if missing:
        drawer = server or _engine(config, folder)
        for record in _drawn(config, drawer, asked, missing, len(keys)):
            if not len(held):
                write_json(config.output / SETTINGS, now)
            held.append([record])
        held.put_in_order([_NAME])
    return Taught(config.output / ROWS, teacher, _write_rows(config, asked, [held.get(key) for key in keys]))


def prompts_of(config: Config) -> PromptData:
    """The data that is asked, with what is left out of it said."""
    data = open_prompts(config.asked.config())
    if distributed.is_main():
        for dropped in data.report:
            print(distributed.printable(str(dropped)))
    return data


def questions(config: Config, data: PromptData) -> list[str | Messages]:
    """What is asked: a text, or a conversation where the data has such."""
    found: list[str | Messages] = []
    for example in list(data)[: config.asked.prompts]:
        # not str.format, to which the braces of \boxed{} would be fields
        text = config.asked.prompt.replace("{question}", example.question)
        if example.messages is None:
            found.append(text)
        else:
            found.append([*example.messages[:-1], {"role": "user", "content": text}])
    return found


def _told(config: Config) -> dict[str, Any]:
    """Settings that samples depend on."""
    names = ("question_columns", "prompt", "system", "chat", "prompts", "samples")
    sampling = config.asked.sampling((), on_policy=False)
    drawn = {
        "sample_temperature": sampling.temperature,
        "sample_top_p": sampling.top_p,
        "max_new_tokens": sampling.max_new_tokens,
        "seed": config.seed,
    }
    of_engine = {
        "dtype": dtype_of(config.sft.dtype).name,
        "teacher_quantization": config.taught_by.teacher_quantization,
    }
    told = {name: getattr(config.asked, name) for name in names} | drawn
    return json.loads(json.dumps(told | ({} if config.taught_by.server else of_engine)))


def _check(path: Path, now: Mapping[str, Any]) -> None:
    before = read_json(path) if path.exists() else {}
    for name, value in before.items():
        if value != now.get(name):
            raise ValueError(
                f"{path}: the samples there have {name} {value!r}, not {now.get(name)!r}; give the same to go on with "
                "them, or another --output"
            )


def _server(config: Config) -> ServerDrawer:
    sampling = config.asked.sampling((), on_policy=False)
    given = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_new_tokens}
    if not config.asked.chat:
        raise ValueError("chat: got --no-chat with a server, wanted a chat: it is asked by /v1/chat/completions")
    by, asked = config.taught_by, config.asked
    options = {"batch": asked.at_once, "system": asked.system, "key_variable": by.server_key}
    return ServerDrawer(by.server, by.server_model, given, **options)


def _engine(config: Config, folder: Path) -> EngineDrawer:
    tokenizer, architecture = Tokenizer.from_folder(folder), load_config(folder)
    if not tokenizer.eos_ids:
        raise ValueError(f"{folder}: names no end-of-sequence token, wanted one for samples to end with")
    layout = config.mesh.serving(architecture, config.mesh.layout)
    quantization = config.taught_by.teacher_quantization
    model = load_model(folder, dtype=dtype_of(config.sft.dtype), layout=layout, quantization=quantization)
    return EngineDrawer(
        Generator(model.config, model.graphdef),
        model.weights,
        tokenizer,
        config.asked.sampling(tokenizer.eos_ids, on_policy=False),
        batch=config.asked.at_once,
        system=config.asked.system,
        chat=config.asked.chat,
    )


def _drawn(
    config: Config, drawer: Drawer, asked: Sequence[str | Messages], missing: Sequence[Key], of: int
) -> Iterator[dict[str, Any]]:
    """Records of what is missing, as they come; a sample's seed is of the run's and of its place alone."""
    seed = lambda key: seeds_for(config.seed, key.number, key.sample, count=1)[0]
    wanted = [Wanted(asked[key.number], seed(key)) for key in missing]
    drawer.check(wanted)
    with Progress(of, "the teacher's samples", start=of - len(missing)) as progress:
        for done, (number, drawn) in enumerate(drawer(wanted), of - len(missing) + 1):
            yield {**_record(missing[number], drawn), "prompt": asked[missing[number].number]}
            progress.update(done)


def _record(key: Key, drawn: Drawn) -> dict[str, Any]:
    # what the template opened is no part of the text
    opened = drawn.prompt[drawn.prompt.rindex(OPEN) :] if opens_thought(drawn.prompt) else ""
    return {
        **{"benchmark": key.benchmark, "number": key.number, "sample": key.sample},
        **{"completion": opened + drawn.text, "tokens": drawn.tokens, "finished": drawn.finished},
        "unclosed": drawn.unclosed,
    }


def _write_rows(
    config: Config, asked: Sequence[str | Messages], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Write the samples to learn from; how many there are, and why others are left out."""
    rows, left_out = [], {}
    for record in records:
        if (reason := _unfit(record)) is not None:
            left_out[reason] = left_out.get(reason, 0) + 1
            continue
        prompt = asked[record["number"]]
        if config.asked.system is not None:
            turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            prompt = [{"role": "system", "content": config.asked.system}, *turns]
        rows.append({"prompt": prompt, "completion": record["completion"], "id": record["number"]})
    told = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if not rows:
        raise ValueError(f"{config.output / 'samples.jsonl'}: no sample to learn from among {len(records)}: {told}")
    write_whole(config.output / ROWS, b"".join(map(json_line, rows)))
    tokens = sum(record["tokens"] for record in records)
    print(
        f"the teacher's samples: {len(rows):,} of {len(records):,} to learn from"
        + (f"; left out: {told}" if told else "")
    )
    return {"teacher_samples": len(records), "teacher_tokens": tokens, "samples_left_out": left_out}


def _unfit(record: Mapping[str, Any]) -> str | None:
    """Why a sample is not learnt from."""
    if not record["finished"]:
        return "cut at the limit of tokens"
    if not record["completion"].removeprefix(OPEN).strip():
        return "empty"
    return "with a thought that never ends" if record["unclosed"] else None
