"""`import deepseek_jax`: what it exports, at no cost until it is used, with an example each that runs."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx

import deepseek_jax as dsj
from deepseek_jax.data.arithmetic import ALPHABET, TEMPLATE
from deepseek_jax.model.decoder import Decoder, split

ROOT = Path(__file__).resolve().parents[1]
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
EXAMPLES = [block for block in re.findall(r"```python\n(.*?)```", API, re.DOTALL) if "dsj." in block]


@pytest.mark.parametrize("name", dsj.__all__)
def test_a_name_is_what_its_home_calls_so(name):
    found = getattr(dsj, name)
    assert found.__name__ == name and found.__module__.startswith("deepseek_jax.")
    assert found.__doc__, "a public name says what it is"


def test_no_name_is_a_rooms_too():
    """The import of a room would put it in the place of the name."""
    rooms = {path.stem for path in (ROOT / "deepseek_jax").iterdir()}
    assert rooms >= {"generation", "rewards"} and not rooms & set(dsj.__all__)


def test_an_unknown_name_is_refused_as_a_module_does():
    with pytest.raises(AttributeError, match="module 'deepseek_jax' has no attribute 'GRPOTrain'"):
        dsj.GRPOTrain  # noqa: B018  (to look it up is what raises)
    assert set(dsj.__all__) <= set(dir(dsj))


def test_importing_loads_no_library_and_knows_every_name():
    code = (
        "import sys; before = set(sys.modules); import deepseek_jax as dsj; names = dir(dsj); import json;"
        "print(json.dumps([sorted(set(sys.modules) - before), names]))"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    loaded, listed = json.loads(out)
    of_ours = {name for name in loaded if name.startswith("deepseek_jax")}
    others = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names) - {"deepseek_jax"}
    assert of_ours == {"deepseek_jax"} and not others
    assert set(dsj.__all__) <= set(listed)


def test_a_name_of_the_configuration_loads_no_jax():
    code = "import sys; from deepseek_jax import preset; preset('r1-671b'); print('jax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out == "False\n"


def test_every_name_is_in_the_list_and_in_an_example():
    table = set(re.findall(r"`(\w+)`", "".join(line for line in API.splitlines() if line.startswith("| "))))
    assert table == set(dsj.__all__)
    used = set(re.findall(r"\bdsj\.(\w+)", "".join(EXAMPLES)))
    assert used == set(dsj.__all__)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    moe = dataclasses.replace(dsj.preset("tiny").moe, first_k_dense_replace=0)
    config = dataclasses.replace(dsj.preset("tiny"), num_hidden_layers=1, moe=moe)
    graphdef, weights = jax.jit(lambda: split(Decoder(config, rngs=nnx.Rngs(0))))()
    folder = tmp_path_factory.mktemp("models") / "MODEL"
    tokenizer = dsj.Tokenizer.characters(ALPHABET, chat_template=TEMPLATE)
    dsj.save_model(dsj.Model(config, graphdef, weights), folder, tokenizer=tokenizer.files)
    return folder


def test_generate_draws_what_its_generator_does(model):
    """Of a folder and of a model in memory, a text and a conversation, with the tokenizer's end of a sequence."""
    loaded, tokenizer = dsj.load_model(model), dsj.Tokenizer.from_folder(model)
    sampling = dsj.SamplingConfig(max_new_tokens=6, temperature=1.0)
    turn = [{"role": "user", "content": "1+2=?"}]
    found = dsj.generate(model, ["1+2=?", turn], sampling=sampling, samples=2, seed=5)
    ends = dataclasses.replace(sampling, stop_ids=tokenizer.eos_ids)
    asked = [tokenizer.chat(turn)] * 2
    wanted = dsj.Generator(loaded.config, loaded.graphdef)(loaded.weights, asked, ends, seeds=[5, 6, 7, 8], samples=2)
    assert [one.tokens.tolist() for one in found] == [one.tokens.tolist() for one in wanted]
    assert [one.text for one in found] == [tokenizer.decode(one.tokens) for one in wanted]
    (alone,) = dsj.generate(loaded, "1+2=?", tokenizer=tokenizer, sampling=sampling, seed=5)
    assert alone.text == found[0].text
    (bare,) = dsj.generate(loaded, "1+2=?", tokenizer=tokenizer, sampling=sampling, seed=5, chat=False)
    assert bare.tokens.tolist() != alone.tokens.tolist()


def test_generate_refuses_what_it_cannot_do(model):
    loaded, tokenizer = dsj.load_model(model), dsj.Tokenizer.from_folder(model)
    with pytest.raises(ValueError, match="tokenizer: got none beside a model in memory"):
        dsj.generate(loaded, "1")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        dsj.generate("nowhere", "1")
    with pytest.raises(ValueError, match="a conversation: got it with --no-chat"):
        dsj.generate(loaded, [[{"role": "user", "content": "1"}]], tokenizer=tokenizer, chat=False)
    with pytest.raises(ValueError, match="prompts: got none"):
        dsj.generate(loaded, [], tokenizer=tokenizer)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example_of_the_list_runs(number, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "MODEL").symlink_to(model)
    exec(compile(EXAMPLES[number], f"docs/api.md, example {number}", "exec"), {"__name__": "__main__"})
