"""PEFT itself, on tiny models of transformers: it reads what we write, and we read what it writes."""

import dataclasses
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.checkpoint.adapters import load_adapter, new_adapter, save_adapter
from deepseek_jax.checkpoint.folder import load_model
from deepseek_jax.commands import merge as merge_lora
from deepseek_jax.model.lora import LoRAConfig, decoder_of, merge, with_adapter
from tools import make_golden

pytestmark = pytest.mark.oracle

TOLERANCE = 5e-5  # float32, logits of magnitude 1 and more
MODELS = {
    "qwen2": lambda rng: make_golden.qwen2(rng, tie_word_embeddings=False),
    "qwen3": lambda rng: make_golden.qwen3(rng, tie_word_embeddings=False),
    "v3": lambda rng: make_golden.deepseek_v3(rng, q_lora_rank=24, first_k_dense_replace=1),
    "v2": lambda rng: make_golden.deepseek_v2(rng, q_lora_rank=None, first_k_dense_replace=1),
    "v32": lambda rng: make_golden.deepseek_v32(rng, first_k_dense_replace=1),
}
DENSE = ("qwen2", "qwen3")


@pytest.fixture(scope="module", params=MODELS)
def case(request, tmp_path_factory):
    """A checkpoint that transformers saved, its logits, and how PEFT's are computed."""
    import torch
    from transformers import AutoModelForCausalLM

    pytest.importorskip("peft", reason="needs peft: pip install peft")
    folder = tmp_path_factory.mktemp(request.param)
    config = MODELS[request.param](random.Random(request.param))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" not in key:
                tensor.copy_(torch.from_numpy(make_golden.tensor_of(0, key, tuple(tensor.shape))))
    model.save_pretrained(folder / "model")
    tokens = np.random.RandomState(0).randint(0, config.vocab_size, (2, 24))

    def logits(model):
        with torch.no_grad():
            return model.eval()(torch.from_numpy(tokens)).logits.numpy()

    fresh = lambda: AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    return SimpleNamespace(name=request.param, model=folder / "model", tokens=tokens, logits=logits, fresh=fresh)


def ours(case, folder, adapter=None, lora=None):
    """Logits, beside an adapter where there is one; merged into the weights it gives the same."""
    config, graphdef, weights = load_model(folder)

    def logits(weights):
        model = decoder_of(graphdef, weights)
        return model.logits(model(case.tokens).x_BTD)

    if adapter is None:
        return np.asarray(jax.jit(logits)(weights))
    found = np.asarray(jax.jit(logits)(with_adapter(weights, adapter, lora)))
    np.testing.assert_allclose(jax.jit(logits)(merge(weights, adapter, lora)), found, rtol=0, atol=TOLERANCE)
    return found


@pytest.mark.parametrize(
    ("targets", "rslora"),
    [("all-linear", False), (("o_proj",), True), (("mlp.down_proj", "shared_experts.gate_proj", "o_proj"), True)],
    ids=["all", "attention", "mlp"],
)
def test_peft_computes_the_same_from_our_folder(case, tmp_path, targets, rslora):
    """Without a warning of a tensor that is missing or left over; and the merged folder says it a third time."""
    from peft import PeftModel

    if case.name in DENSE and isinstance(targets, tuple):
        targets = tuple(target for target in targets if "experts" not in target)
    lora = LoRAConfig(rank=3, alpha=6, targets=targets, rslora=rslora)
    config = load_model(case.model).config
    drawn = np.random.default_rng(1)
    adapter = jax.tree.map(
        lambda a: jnp.asarray(drawn.normal(0, 0.1, a.shape), a.dtype), new_adapter(config, lora, seed=0)
    )
    save_adapter(adapter, lora, config, tmp_path / "adapter", base=str(case.model))
    model = PeftModel.from_pretrained(case.fresh(), tmp_path / "adapter", autocast_adapter_dtype=False)
    report = model.load_adapter(tmp_path / "adapter", adapter_name="default")
    assert not report.unexpected_keys and not [key for key in report.missing_keys if "lora" in key]
    wanted = case.logits(model)
    assert np.abs(wanted - case.logits(case.fresh())).max() > 0.1
    np.testing.assert_allclose(ours(case, case.model, adapter, lora), wanted, rtol=0, atol=TOLERANCE)
    merge_lora.main(case.model, tmp_path / "adapter", tmp_path / "merged")
    from transformers import AutoModelForCausalLM

    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=model.dtype)
    np.testing.assert_allclose(case.logits(merged), wanted, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rslora", [False, True])
def test_we_compute_the_same_from_pefts_folder(case, tmp_path, rslora):
    """Attention, and where no experts are in the way all linear layers, with PEFT's own spelling of them."""
    import peft

    targets = "all-linear" if case.name in DENSE else ["o_proj", "kv_b_proj"]
    parameters = None if case.name in DENSE else ["shared_experts.up_proj.weight"]
    settings = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=targets,
        target_parameters=parameters,
        use_rslora=rslora,
        init_lora_weights=False,  # B is not zero
    )
    model = peft.get_peft_model(case.fresh(), settings)
    model.save_pretrained(tmp_path / "adapter")
    config = load_model(case.model).config
    lora, adapter = load_adapter(tmp_path / "adapter", config)
    assert dataclasses.replace(lora, targets="all-linear") == LoRAConfig(
        rank=4, alpha=8, targets="all-linear", rslora=rslora
    )
    wanted = case.logits(model)
    assert np.abs(wanted - case.logits(case.fresh())).max() > 0.1
    np.testing.assert_allclose(ours(case, case.model, adapter, lora), wanted, rtol=0, atol=TOLERANCE)
