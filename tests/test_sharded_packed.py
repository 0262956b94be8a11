"""Packed weights on a mesh of eight devices draw what they draw on one."""

import dataclasses
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.checkpoint import names
from deepseek_jax.checkpoint.folder import Model, load_model
from deepseek_jax.checkpoint.save import save_model
from deepseek_jax.generation.generator import Generator
from deepseek_jax.generation.sampling_config import SamplingConfig
from deepseek_jax.model.decoder import Decoder, abstract_weights, split
from deepseek_jax.model.packing import packed_like
from deepseek_jax.ops.packed import Packed
from deepseek_jax.sharding import LOCAL, Layout, make_mesh
from tests.laws import fixture_of
from tests.test_sharded_steps import GQA, MLA, SPARSE

WIDE = {"moe": dataclasses.replace(MLA.moe, moe_intermediate_size=144), "hidden_size": 256, "intermediate_size": 320}
GROUPED = dataclasses.replace(
    GQA, model_type="qwen3", attention=dataclasses.replace(GQA.attention, qkv_bias=False), initializer_range=0.3
)  # as a folder can say it
MODELS = {
    "mla": (dataclasses.replace(MLA, **WIDE, num_nextn_predict_layers=0, initializer_range=0.3), "fp8"),
    "sparse": (dataclasses.replace(SPARSE, **WIDE, initializer_range=0.3), "int4"),
    "gqa": (dataclasses.replace(GROUPED, hidden_size=256, intermediate_size=320), "int4"),
    "gqa in columns": (GROUPED, "int8"),
}


def packed_on_a_mesh_is_packed_on_one_device():
    """Codes and scales are the same, parts lie as the weights do, and greedy tokens are equal; scanned or not."""
    prompts = [[1, 5, 9, 2, 2, 7, 11], [4], [3, 8, 8, 1], [9, 9]]
    for name, (config, quantization) in MODELS.items():
        folder = Path(tempfile.mkdtemp()) / "model"
        save_model(Model(config, *split(Decoder(config, rngs=nnx.Rngs(0)))), folder)
        found = {}
        sizes = {"expert": 2 if config.moe else 1, "tensor": 4}
        mesh = make_mesh(data=8 // (sizes["expert"] * 4), **sizes)
        for layout in (LOCAL, *(Layout(mesh=mesh, workload="serve", scan_layers=scan) for scan in (False, True))):
            model = load_model(folder, quantization=quantization, layout=layout)
            generator = Generator(model.config, model.graphdef)
            sampling = SamplingConfig(max_new_tokens=8, temperature=0.0)
            drawn = generator(model.weights, prompts, sampling, seeds=[0] * 4)
            found[layout] = [of.tokens.tolist() for of in drawn], names.flat(model.weights)
        (wanted, ours), (got, theirs), (scanned, _) = found.values()
        assert got == wanted and scanned == wanted, name
        packed = {key: value for key, value in ours.items() if isinstance(value, Packed)}
        assert packed
        for key, value in packed.items():
            for one, other in zip(jax.tree.leaves(value), jax.tree.leaves(theirs[key]), strict=True):
                bits = lambda a: np.asarray(a.astype(np.float32))
                np.testing.assert_array_equal(bits(one), bits(other), err_msg=f"{name} {key}")
        down = theirs["layers.0.mlp.down"]  # rows are cut in four: of 80 each, and 128 share a scale
        assert "tensor" in str(down.codes.sharding.spec[0])
        assert "tensor" not in str(down.scale.sharding.spec[:1])


def packed_on_a_mesh_to_train_on_is_refused():
    config, quantization = MODELS["gqa"]
    layout = Layout(mesh=make_mesh(fsdp=8))
    with pytest.raises(ValueError, match="quantization: got 'int4' on a mesh to train on"):
        packed_like(config, abstract_weights(config, layout=layout)[1], quantization, layout)


LAWS = [packed_on_a_mesh_is_packed_on_one_device, packed_on_a_mesh_to_train_on_is_refused]
laws = fixture_of(LAWS)


@pytest.mark.slow
@pytest.mark.parametrize("law", [law.__name__ for law in LAWS])
def test_on_eight_devices(law, laws):
    assert laws[law] == "", laws[law]
