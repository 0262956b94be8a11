"""Which command runs a plan, which one compiles its step, and what is still missing to run it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from deepseek_jax.plan.chips import chip
from deepseek_jax.plan.meshes import Sizes
from deepseek_jax.plan.planner import Plan
from deepseek_jax.plan.topology import compilable

Step = Literal["decode", "train", "grpo", "sync"]
_DTYPES = {"bf16": "bfloat16", "f32": "float32"}
_GROUP = 16  # samples a question, if the batch has as many (R1)
_STEPS = {"serve": "decode", "train": "train", "grpo": "grpo"}


@dataclass(frozen=True, kw_only=True)
class Commands:
    """`run` and `compile` are command lines; None where there is none yet. FOLDER, FILE and NEW are to be filled in,
    NEW with the tokens of a context that the longest prompt leaves. `missing` says what keeps the plan from being run
    as it stands: without it the plan is more than an estimate. `compile` is of GRPO's update; `compile_also` of the
    other phases of its step that have a program of their own, transfer and rollout."""

    run: str | None
    compile: str | None
    missing: tuple[str, ...]
    compile_also: tuple[str, ...] = ()


def commands(plan: Plan, model: str) -> Commands:
    """The commands of a plan.

    Args:
        plan: of `planner.plan`.
        model: as given to the planner: a preset's name or a folder.
    """
    run, missing = {"serve": _serve, "train": _train, "grpo": _grpo}[plan.workload](plan)
    compile_step = _compile(plan, model, _STEPS[plan.workload], plan.mesh)
    also = ()
    if plan.workload == "grpo" and compile_step is not None:
        of_serving = {axis: plan.rollout_mesh[axis] for axis in ("expert", "tensor")}
        sync = _compile(plan, model, "sync", plan.mesh) + f" --serve-mesh {_words(of_serving)}"
        also = (sync, _compile(plan, model, "decode", plan.rollout_mesh))
    return Commands(run=run, compile=compile_step, missing=missing, compile_also=also)


def _serve(plan: Plan) -> tuple[str | None, tuple[str, ...]]:
    cache = (
        ""
        if plan.kv_cache_dtype == "bf16"
        else f" --kv-cache-dtype {_DTYPES.get(plan.kv_cache_dtype, plan.kv_cache_dtype)}"
    )
    how = f"{_quantization(plan)}{cache}{_sampling(plan, plan.mesh)}"
    return f"deepseek-jax generate FOLDER --prompt TEXT{how}", ()


def _quantization(plan: Plan) -> str:
    return "" if plan.dtype in ("bf16", "f32") else f" --quantization {plan.dtype}"


def _sampling(plan: Plan, mesh: Mapping[str, int]) -> str:
    """Options of the layout to sample in, all of them: what is left out a program chooses by itself."""
    if _devices(plan) == 1:
        return ""
    return "".join(f" --serve-{axis} {mesh[axis]}" for axis in ("expert", "tensor"))


def _train(plan: Plan) -> tuple[str | None, tuple[str, ...]]:
    batch = f"--batch-size {plan.batch} --max-length {plan.context}"
    return f"deepseek-jax sft --model FOLDER --data FILE{_update(plan)} {batch}", ()


def _grpo(plan: Plan) -> tuple[str | None, tuple[str, ...]]:
    if plan.batch == 1:
        return None, ("a plan with more samples than one: a group of one learns nothing; give a batch",)
    group = max(of for of in range(2, min(plan.batch, _GROUP) + 1) if plan.batch % of == 0 or of == 2)
    batch = f"--prompts-per-step {plan.batch // group} --group-size {group} --max-new-tokens NEW"
    sampling = _sampling(plan, plan.rollout_mesh)
    return f"deepseek-jax train --model FOLDER --data FILE{_update(plan)}{sampling} {batch}", ()


def _update(plan: Plan) -> str:
    """Options of how weights lie and are trained."""
    mesh = "".join(f" --mesh-{axis} {size}" for axis, size in plan.mesh.items() if size > 1)
    dtypes = f"--dtype {_DTYPES[plan.dtype]} --moments {plan.moments}"
    return f"{mesh} --scan-layers --remat all_but_attention {dtypes}"


def _words(mesh: Mapping[str, int]) -> str:
    return ",".join(f"{axis}={size}" for axis, size in mesh.items())


def _compile(plan: Plan, model: str, step: Step, mesh: Mapping[str, int]) -> str | None:
    """By the compiler of the plan's chips, where it can be had without them."""
    of_chip = chip(plan.chip)
    if not compilable(of_chip):
        return None
    topology = f"{of_chip.name}:{plan.slice.replace(' ', '')}"
    words = [f"deepseek-jax compile --preset {model} --topology {topology} --step {step}"]
    if step != "sync":
        # a cache has rows for every part that the mesh cuts it into
        parts = Sizes(**mesh).parts("serve", "cache_batch") if step == "decode" else 1
        words.append(f"--batch {math.ceil(plan.batch / parts) * parts} --context {plan.context}")
    if sizes := {axis: size for axis, size in mesh.items() if size > 1}:
        words.append(f"--mesh {_words(sizes)}")
    if plan.dtype == "f32":
        words.append("--dtype f32")
    if quantization := _quantization(plan):
        words.append(quantization.strip())
    if step == "decode" and plan.kv_cache_dtype != ("f32" if plan.dtype == "f32" else "bf16"):
        words.append(f"--kv-cache-dtype {plan.kv_cache_dtype}")
    if step in ("train", "grpo") and plan.moments != "float32":
        words.append(f"--moments {plan.moments}")
    return " ".join(words)


def _devices(plan: Plan) -> int:
    return plan.chips * chip(plan.chip).devices
