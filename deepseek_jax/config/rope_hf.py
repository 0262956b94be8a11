"""Rotary embeddings in config.json: every spelling of the hub and of transformers 5, read; the hub's, written."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

from deepseek_jax.config.keys import Reader, check_harmless
from deepseek_jax.config.model import Llama3RopeConfig, RopeConfig, YarnConfig, shown, yarn_mscale

_KINDS = {"default": RopeConfig, "yarn": YarnConfig, "llama3": Llama3RopeConfig}
# What transformers' modeling_rope_utils.py takes for keys that are left out. mscale_all_dim 0 means that cos and sin
# are scaled by mscale 1 and scores are not.
_YARN = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
_ORIGINAL = "original_max_position_embeddings"


def read_rope(reader: Reader, longest: int) -> RopeConfig:
    """rope_theta and rope_scaling, the hub's, or rope_parameters, transformers 5's, or a mixture that agrees.

    Args:
        reader: the file's keys.
        longest: its max_position_embeddings, which is YaRN's original length for transformers where that is missing.
    """
    values = _merged(reader)
    kind = _kind(values)
    theta = values.pop("rope_theta", None)
    if theta is None:
        raise ValueError("rope_theta is missing, at the top or in rope_parameters")
    for name in ("partial_rotary_factor", "mrope_section"):
        check_harmless({name: values.pop(name, None)})
    if kind == "default":
        _only(values, "factor", None, 1, why="rope of type 'default' is not scaled")
    if kind == "yarn":
        values = {**_YARN, _ORIGINAL: longest, **values}
        _only(values, "truncate", None, True, why="the ramp's ends are whole numbers here")
        factors = {name: values.pop(name, None) for name in ("attention_factor", "attn_factor")}
    try:
        rope = _KINDS[kind](theta=theta, **values)
    except TypeError as problem:
        raise ValueError(f"rope parameters of type {kind!r}: {str(problem).split('() ')[-1]}") from None
    if isinstance(rope, YarnConfig):
        _check_amplitude(rope, **factors)
    return rope


def _merged(reader: Reader) -> dict[str, Any]:
    """All that the file says of rope. Two places may say the same thing, but not two things."""
    found: dict[str, Any] = {}
    of_top = {name: reader.take(name, None) for name in ("rope_theta", _ORIGINAL)}
    of_top = {name: value for name, value in of_top.items() if value is not None}
    for name, values in (
        ("config.json", of_top),
        *((name, reader.or_null(name, {})) for name in ("rope_scaling", "rope_parameters")),
    ):
        if not isinstance(values, Mapping):
            raise ValueError(f"{name}: got {shown(values)}, wanted an object or null")
        for key, value in values.items():
            if key in found and found[key] != value:
                raise ValueError(f"{key}: got {shown(found[key])} and, in {name}, {shown(value)}; wanted one value")
            found[key] = value
    return found


def _kind(values: dict[str, Any]) -> str:
    """`rope_type`, or `type`, its older name; transformers 5 keeps both."""
    new, old = values.pop("rope_type", None), values.pop("type", None)
    kind = new or old or "default"
    if kind not in tuple(_KINDS):
        raise ValueError(
            f"rope type: got {shown(kind)}, wanted 'default', 'yarn' or 'llama3'; no other is computed here"
        )
    if new and old and new != old:
        raise ValueError(f"rope type: got rope_type {shown(new)} and type {shown(old)}, wanted one of the two")
    return kind


def _only(values: dict[str, Any], name: str, *allowed: Any, why: str) -> None:
    """Take a key out that may be there at values that change nothing."""
    value = values.pop(name, None)
    if value not in allowed:
        raise ValueError(f"rope key {name!r}: got {shown(value)}, wanted {allowed[-1]!r} or none; {why}")


def _check_amplitude(rope: YarnConfig, *, attention_factor: Any, attn_factor: Any) -> None:
    """What cos and sin are multiplied by follows from factor and mscale here; a file may say so, and nothing else.

    transformers takes `attention_factor` in place of what follows, and passes over `attn_factor`, by which vLLM and
    the YaRN paper's code multiply it. DeepSeek-R1-0528-Qwen3-8B has the `attn_factor` that makes it 1 there; it is
    passed over here too, with a warning.
    """
    follows = rope.amplitude
    if attention_factor is not None and not _close(attention_factor, follows):
        raise ValueError(
            f"attention_factor: got {shown(attention_factor)}, wanted {follows:.9g} or none; "
            "it follows from factor and mscale here"
        )
    if attn_factor is None or _close(attn_factor, 1.0):
        return
    if not _close(attn_factor, 1 / yarn_mscale(rope.factor, 1.0)):
        raise ValueError(
            f"attn_factor: got {shown(attn_factor)}, wanted none; transformers passes over it and other programs scale "
            "attention by it, so take it out of the file for what transformers computes"
        )
    warnings.warn(
        f"config.json: attn_factor {attn_factor:.9g} is passed over, as by transformers: cos and sin are multiplied by "
        f"{follows:.9g}, and by {follows * attn_factor:.9g} in programs that use it",
        stacklevel=2,
    )


def _close(value: Any, wanted: float) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isclose(value, wanted, rel_tol=1e-6)


def write_rope_scaling(rope: RopeConfig) -> dict[str, Any] | None:
    """`rope_scaling` as the hub has it, with both names of the type; null for plain rope."""
    kind = next(name for name, of in _KINDS.items() if of is type(rope))
    rest = {name: value for name, value in vars(rope).items() if name != "theta"}
    return None if kind == "default" else {"type": kind, "rope_type": kind, **rest}
