"""Live comparison of the multi-token prediction modules with transformers' MtpModel, over random tiny checkpoints."""

import json
import random
from collections.abc import Mapping
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.config import ModelConfig, from_hf
from deepseek_jax.model.decoder import abstract_weights
from tools import make_golden

pytestmark = [pytest.mark.oracle, pytest.mark.usefixtures("quick_compilation")]

TOLERANCE = 5e-5  # float32, logits of magnitude 4
T = 60
CASES = {
    "yarn": {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "rope_parameters": make_golden.yarn(1.0)},
    "yarn-two-modules": {"num_mtp_layers": 2, "rope_parameters": make_golden.yarn(0.7)},
    "plain": {"q_lora_rank": None, "rope_parameters": make_golden.plain_rope(), "rms_norm_eps": 1e-3},
    "plain-three-modules": {"num_mtp_layers": 3, "rope_parameters": make_golden.plain_rope()},
}


OF_SEEDS = [
    pytest.param((name, seed), id=f"{name}-{seed}", marks=[pytest.mark.slow] * seed)
    for name in CASES
    for seed in range(2)
]


@pytest.fixture(scope="module", params=OF_SEEDS)
def case(request, tmp_path_factory):
    """A folder with MTP tensors as the hub has them, what we make of it, and transformers' own loading of it."""
    import torch
    import transformers
    from safetensors.numpy import save_file
    from transformers.cache_utils import MtpCache
    from transformers.modeling_layers import MtpModel

    name, seed = request.param
    folder = tmp_path_factory.mktemp("mtp")
    theirs = make_golden.deepseek_v3(random.Random(f"mtp {name} {seed}"), **CASES[name])
    theirs.save_pretrained(folder)
    config = from_hf(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    table = names.tensors(config, abstract_weights(config)[1])
    main = {(t.path[-1], t.shape): t.name for t in table if len(t.path) == 1}
    # the module's copies of embedding and head hold what the model's own do
    source = lambda t: main[t.path[-1], t.shape] if t.copy_of else t.name
    arrays = {t.name: make_golden.tensor_of(seed, source(t), t.shape) for t in table}
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})

    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # transformers looks for R1's layer 61 alone
    loaded._keys_to_ignore_on_load_unexpected = [
        rf"model\.layers\.{config.num_hidden_layers + depth}\." for depth in range(config.num_nextn_predict_layers)
    ]
    mtp = MtpModel.from_pretrained(loaded).eval()
    return SimpleNamespace(
        config=config, weights=weights_of(config, arrays), model=loaded, mtp=mtp, cache=MtpCache, seed=seed
    )


def weights_of(config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> tuple[nnx.GraphDef, nnx.State]:
    """Our weights from tensors by their names on the hub."""
    graphdef, abstract = abstract_weights(config)
    parts: dict[str, list[np.ndarray]] = {}
    for tensor in names.tensors(config, abstract):
        if not tensor.copy_of:
            value = arrays[tensor.name]
            parts.setdefault(names.key(tensor.path), []).append(value.T if tensor.transposed else value)
    whole = {key: jnp.asarray(np.stack(values) if "experts" in key else values[0]) for key, values in parts.items()}
    return graphdef, names.unflat(whole, abstract)


def test_drafts_equal_transformers(case):
    """Every position of every module, and transformers' own drafting at the last one."""
    import torch

    depths = case.config.num_nextn_predict_layers
    text = np.random.RandomState(case.seed).randint(0, case.config.vocab_size, (2, T + depths))
    graphdef, weights = case.weights

    @jax.jit
    def run(weights, tokens, following):
        model = nnx.merge(graphdef, weights)
        hidden = model(tokens)
        drafts = model.draft(hidden.x_BTD, following)
        return model.logits(hidden.x_BTD), [model.logits(draft.x_BTD) for draft in drafts]

    # columns past T give every module its whole text; what the model makes of them is not looked at
    main, drafts = run(weights, text, np.pad(text[:, 1:], ((0, 0), (0, 1))))
    assert len(drafts) == depths
    tokens, positions = torch.from_numpy(text), torch.arange(T)[None]
    empty_cache = lambda: case.cache(config=case.model.config.get_mtp_config())
    with torch.no_grad():
        states = case.model.model(tokens[:, :T]).last_hidden_state
        close(main[:, :T], case.model.lm_head(states))
        state, cache = states, empty_cache()
        for depth in range(depths):
            joined = tokens[:, depth + 1 : depth + 1 + T]
            state = case.mtp.forward_layer(depth, state, positions + depth + 1, cache, input_ids=joined)
            wanted = case.model.lm_head(state)
            assert wanted.abs().max() > 1  # the comparison says something
            close(drafts[depth][:, :T], wanted)
        _, drafted, _ = case.mtp(tokens[:, 1 : T + 1], states, None, positions + 1, empty_cache())
    close(drafts[0][:, T - 1], drafted[:, 0])


def close(got, wanted):
    np.testing.assert_allclose(got, wanted.numpy(), rtol=0, atol=TOLERANCE)
