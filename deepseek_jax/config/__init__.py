"""Model configurations: what they are, Hugging Face's config.json in and out, and the published ones.

Imports no jax: a configuration can be read, checked and planned with on any machine.
"""

from deepseek_jax.config.hf import from_hf, to_hf
from deepseek_jax.config.model import (
    FP8Config,
    GQAConfig,
    IndexerConfig,
    Llama3RopeConfig,
    MLAConfig,
    ModelConfig,
    MoEConfig,
    RopeConfig,
    YarnConfig,
    yarn_mscale,
)
from deepseek_jax.config.presets import PRESETS, preset

__all__ = [
    "FP8Config",
    "GQAConfig",
    "IndexerConfig",
    "Llama3RopeConfig",
    "MLAConfig",
    "ModelConfig",
    "MoEConfig",
    "PRESETS",
    "RopeConfig",
    "YarnConfig",
    "from_hf",
    "preset",
    "to_hf",
    "yarn_mscale",
]
