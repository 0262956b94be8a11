"""Live comparison with transformers, over random tiny checkpoints that transformers itself saves."""

import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint.convert import convert_hf, export_hf
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.checkpoint.model_folder import load_config, open_folder
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.cache import empty_cache
from tools import make_golden

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 5e-5  # float32, logits of magnitude 4
ATTN_FACTOR = 0.8782488562869419  # of R1-0528-Qwen3-8B, which transformers passes over
CASES = {
    "v3": lambda rng: make_golden.deepseek_v3(rng),
    "v3-groups-yarn": lambda rng: make_golden.deepseek_v3(
        rng, n_group=4, topk_group=2, q_lora_rank=24, rope_parameters=make_golden.yarn(1.0)
    ),
    "v3-full-query": lambda rng: make_golden.deepseek_v3(rng, q_lora_rank=None),
    "v32": lambda rng: make_golden.deepseek_v32(rng, rope_parameters=make_golden.plain_rope()),
    "v32-yarn": lambda rng: make_golden.deepseek_v32(rng, rope_parameters=make_golden.yarn(1.0)),
    "v2-lite": lambda rng: make_golden.deepseek_v2(
        rng, q_lora_rank=None, topk_method="greedy", rope_parameters=make_golden.yarn(0.707)
    ),
    "v2-groups": lambda rng: make_golden.deepseek_v2(rng, q_lora_rank=24, topk_method="group_limited_greedy"),
    "v2-yarn-two-mscales": lambda rng: make_golden.deepseek_v2(rng, rope_parameters=make_golden.yarn(0.5, mscale=1.0)),
    "qwen2": lambda rng: make_golden.qwen2(rng, tie_word_embeddings=False),
    "qwen2-tied": lambda rng: make_golden.qwen2(rng, tie_word_embeddings=True),
    "qwen2-yarn": lambda rng: make_golden.qwen2(
        rng, tie_word_embeddings=False, rope_parameters=make_golden.short_yarn()
    ),
    "qwen3": lambda rng: make_golden.qwen3(rng, tie_word_embeddings=False, rms_norm_eps=1e-3),
    "qwen3-tied": lambda rng: make_golden.qwen3(rng, tie_word_embeddings=True),
    "qwen3-yarn": lambda rng: make_golden.qwen3(rng, rope_parameters=make_golden.short_yarn(attn_factor=ATTN_FACTOR)),
    "kimi-k2": lambda rng: make_golden.kimi_k2(rng),
    "llama3": lambda rng: make_golden.llama(rng, tie_word_embeddings=False),
    "llama3-tied": lambda rng: make_golden.llama(rng, tie_word_embeddings=True),
    "llama-yarn-of-its-own-length": lambda rng: make_golden.llama(
        rng, max_position_embeddings=64, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    ),
}


OF_SEEDS = [
    pytest.param((name, seed), id=f"{name}-{seed}", marks=[pytest.mark.slow] * seed)
    for name in CASES
    for seed in range(2)
]


@pytest.fixture(scope="module", params=OF_SEEDS)
def case(request, tmp_path_factory):
    """A checkpoint that transformers saved in shards, a converted and an exported copy, and transformers' logits."""
    import torch
    from transformers import AutoModelForCausalLM

    name, seed = request.param
    folder = tmp_path_factory.mktemp(f"{name}-{seed}")
    config = CASES[name](random.Random(f"{name} {seed}"))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in key:
                tensor.copy_(torch.from_numpy(make_golden.tensor_of(seed, key, tuple(tensor.shape))))
        tokens = np.random.RandomState(seed).randint(0, config.vocab_size, (2, 70))
        wanted = model(torch.from_numpy(tokens)).logits.numpy()
    saved, converted, exported = folder / "saved", folder / "converted", folder / "exported"
    model.save_pretrained(saved, max_shard_size="60KB")
    if name in make_golden.OWN_NAMES:
        values = json.loads((saved / "config.json").read_text())
        (saved / "config.json").write_text(json.dumps(values | {"model_type": make_golden.OWN_NAMES[name]}))
    convert_hf(open_folder(saved), converted)
    export_hf(open_folder(converted), exported)
    return SimpleNamespace(
        config=config, saved=saved, converted=converted, exported=exported, tokens=tokens, wanted=wanted
    )


def test_logits_equal_transformers(case):
    _, graphdef, _ = load_model(case.saved)

    @jax.jit
    def forward(weights):
        module = nnx.merge(graphdef, weights)
        return module.logits(module(case.tokens).x_BTD)

    assert np.abs(case.wanted).max() > 1  # the comparison says something
    for folder in (case.saved, case.converted):
        np.testing.assert_allclose(forward(load_model(folder).weights), case.wanted, rtol=0, atol=TOLERANCE)


def test_decoding_token_by_token_gives_transformers_logits(case):
    """For MLA this is absorbed attention, for V3.2 over gathered keys, against transformers' full forward pass."""
    config, graphdef, weights = load_model(case.saved)
    B, T = case.tokens.shape

    @jax.jit
    def decode(weights):
        module = nnx.merge(graphdef, weights)

        def step(cache, now):
            token_B, position = now
            at, real = jnp.full((B, 1), position), jnp.ones((B, 1), bool)
            hidden, cache = module.extend(token_B[:, None], at, real, cache, table, phase="decode")
            return cache, module.logits(hidden.x_BTD)[:, 0]

        table = jnp.arange(B * (T // 4 + 1)).reshape(B, -1)  # one block after another
        empty = empty_cache(config, table.size, 4, jnp.float32)
        return jax.lax.scan(step, empty, (case.tokens.T, jnp.arange(T)))[1]

    np.testing.assert_allclose(decode(weights).swapaxes(0, 1), case.wanted, rtol=0, atol=TOLERANCE)


def test_the_hub_spelling_of_rope_gives_the_same_model(case, tmp_path: Path):
    values = json.loads((case.saved / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(hub_spelling(values)))
    assert load_config(tmp_path) == load_config(case.saved)


def test_export_gives_back_every_tensor(case):
    before, after = tensors_of(case.saved), tensors_of(case.exported)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.dtype == after[name].dtype and value.tobytes() == after[name].tobytes(), name


def test_transformers_loads_the_export_to_the_same_logits(case):
    import torch
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    model, report = load(case.exported, config=case.config, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        again = model.eval()(torch.from_numpy(case.tokens)).logits.numpy()
    np.testing.assert_array_equal(again, case.wanted)


@pytest.mark.parametrize("name", ["qwen3-yarn", "kimi-k2"])
def test_greedy_generation_is_that_of_transformers(name, tmp_path: Path):
    """A folder as it is saved, prompts of several lengths, the engine's prefill and decode."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = CASES[name](random.Random(name))
    config.initializer_range = 0.3  # far from uniform predictions
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.save_pretrained(tmp_path)
    prompts = [[5, 9, 11, 3, 2, 40, 17], [7], [1, 2, 3, 4]]
    wanted = []
    for prompt in prompts:
        text = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        wanted.append(text[len(prompt) :])
    assert len({token for text in wanted for token in text}) > 5  # the comparison says something
    ours, graphdef, weights = load_model(tmp_path)
    generate = Generator(dataclasses.replace(ours, eos_token_id=None), graphdef)
    settings = SamplingConfig(max_new_tokens=12, temperature=0.0)
    found = generate(weights, prompts, settings, seeds=[0, 1, 2], samples=1)
    assert [completion.tokens.tolist() for completion in found] == wanted


def hub_spelling(values: dict) -> dict:
    """config.json with rope_theta and rope_scaling, as on the hub, for transformers 5's rope_parameters."""
    rope = dict(values["rope_parameters"])
    theta, kind = rope.pop("rope_theta"), rope.pop("rope_type")
    scaling = None if kind == "default" else {"type": kind, **rope}
    rest = {name: value for name, value in values.items() if name != "rope_parameters"}
    return rest | {"rope_theta": theta, "rope_scaling": scaling}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
