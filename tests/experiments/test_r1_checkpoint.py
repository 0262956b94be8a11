"""The recipe on a given checkpoint: asked as the benchmark asks, easier sums shown, none held out that is learnt."""

import dataclasses
import json

import jax
import pytest
from flax import nnx

from deepseek_jax.checkpoint.folder import Model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.commands import rejection
from deepseek_jax.data.sources import open_source
from deepseek_jax.evals.tasks import task_named
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.rewards.format import boxed_format_reward
from deepseek_jax.text.tokenizer import Tokenizer
from experiments.r1_checkpoint import Config, main, write_data
from tests.checkpoint.folders import LLAMA_TIED

TEMPLATE = (
    "{% for message in messages %}{{ '[' + message['role'] + ']' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
SMALL = {"train": 20, "held_out": 6, "demonstrations": 12}
TINY = {
    "cold_start": {"steps": 2, "batch_size": 4, "max_length": 256},
    "rl_1": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "eval_questions": 2},
    "rejection": {"limit": 2, "samples": 2, "max_tokens": 8},
    "sft": {"steps": 2, "batch_size": 2, "eval_rows": 1, "max_length": 256},
    "rl_2": {"steps": 2, "prompts_per_step": 2, "group_size": 2, "max_new_tokens": 8, "eval_questions": 2},
    "evaluation": {"max_tokens": 8},
}


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_demonstrations_are_asked_as_the_benchmark_asks_and_have_its_form(tmp_path):
    found = write_data(Config(model=tmp_path, output=tmp_path, **SMALL))
    task = task_named("gsm8k")
    source = open_source(str(found["data"]))
    asks = {task.styles["deepseek"].write(task.read(source[n], n)).partition("\n")[2] for n in range(len(source))}
    for row in rows(found["cold_start"]):
        asked, said = (message["content"] for message in row["messages"])
        assert {asked.partition("\n")[2]} == asks and asked.startswith("What is ")
        assert task.form == "boxed" and boxed_format_reward([""], [said], [[]]) == [1.0]


def test_no_question_is_held_out_that_is_learnt_and_the_seed_says_which(tmp_path):
    one, other = (write_data(Config(model=tmp_path, output=tmp_path / of, **SMALL)) for of in "ab")
    assert all(one[name].read_bytes() == other[name].read_bytes() for name in one)
    learnt = {row["question"] for row in rows(one["data"])}
    held_out = {row["question"] for row in rows(one["held_out"])}
    assert len(learnt) == 20 and len(held_out) == 6 and not learnt & held_out


def test_questions_of_gsm8k_stand_among_the_sums(tmp_path):
    (tmp_path / "gsm8k.jsonl").write_text('{"question": "How many?", "answer": "2+2 = 4\\n#### 4", "more": 1}\n')
    found = write_data(Config(model=tmp_path, output=tmp_path, gsm8k=tmp_path / "gsm8k.jsonl", **SMALL))
    assert len(rows(found["data"])) == 21 and {row["question"] for row in rows(found["data"])} >= {"How many?"}


def test_more_sums_than_there_are_are_refused(tmp_path):
    with pytest.raises(ValueError, match="largest: got 2, wanted more for 26 different sums of 3 numbers"):
        write_data(Config(model=tmp_path, output=tmp_path, largest=2, **SMALL))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_dense_checkpoint_goes_through_every_stage(tmp_path, monkeypatch):
    tokenizer = Tokenizer.characters("".join(map(chr, range(32, 127))) + "\n", chat_template=TEMPLATE)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_ids[0]}
    sizes = {"vocab_size": tokenizer.vocab_size, "num_hidden_layers": 1, "max_position_embeddings": 512}
    config = dataclasses.replace(LLAMA_TIED, **sizes, **ids)
    weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0)))[1])()
    save_model(Model(config, abstract_weights(config)[0], weights), tmp_path / "model", tokenizer=tokenizer.files)
    monkeypatch.setattr(rejection, "verdicts", lambda samples, *_, **__: [None] * len(samples))
    sets = tuple(f"{stage}.{name}={value}" for stage, values in TINY.items() for name, value in values.items())
    main(Config(model=tmp_path / "model", output=tmp_path / "out", set=sets, **SMALL))
    summary = json.loads((tmp_path / "out" / "run" / "summary.json").read_text())
    assert [of["name"] for of in summary["stages"]] == ["cold_start", "rl_1", "sft", "rl_2"] and summary["finished"]
