"""What the training commands share: options of devices and logs, the settings in a run's folder, the model's dtype."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deepseek_jax import distributed
from deepseek_jax.checkpoint.files import write_whole
from deepseek_jax.checkpoint.model_folder import named_dtype
from deepseek_jax.config import ModelConfig
from deepseek_jax.model.precision import Precision
from deepseek_jax.model.transfer import serving_layout
from deepseek_jax.report.metrics import WandbConfig
from deepseek_jax.sharding import AXES, Layout, Remat, lanes_of, make_mesh
from deepseek_jax.train.runs import RunSettings, enter_folder


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How the model is divided over devices.

    Args:
        mesh_data: replicas of the model. The product of the five sizes of the mesh must be the number of devices of
            all processes; all 1 in one process is a run on its first device, however many there are.
        mesh_fsdp: parts that weights are cut into by their width, and batches by row.
        mesh_expert: groups of devices that the experts are divided between; batches are cut by them as well.
        mesh_context: parts of every sequence, and of the weights' width.
        mesh_tensor: parts of heads, inner widths and vocabulary.
        scan_layers: layers of one kind are one stack, run by a scan: a deep model compiles in the time of one layer.
        remat: what the backward pass works out again: nothing, whole layers, or all of a layer but its attention.
    """

    mesh_data: int = 1
    mesh_fsdp: int = 1
    mesh_expert: int = 1
    mesh_context: int = 1
    mesh_tensor: int = 1
    scan_layers: bool = False
    remat: Remat = "nothing"

    @property
    def layout(self) -> Layout:
        """How the model lies on the devices and runs there."""
        sizes = {axis: getattr(self, f"mesh_{axis}") for axis in AXES}
        one_device = distributed.process_count() == 1 and all(size == 1 for size in sizes.values())
        return Layout(
            mesh=None if one_device else make_mesh(**sizes),
            scan_layers=self.scan_layers,
            remat=self.remat,
            lanes=lanes_of(jax.default_backend()),
        )


@dataclass(frozen=True, kw_only=True)
class SamplingMeshOptions(MeshOptions):
    """How the model is divided over devices, to train and to sample.

    Args:
        serve_expert: groups that whole experts are divided between, with serve_tensor, while samples are drawn: on a
            mesh weights are moved to a layout of its own for that, in which none is gathered. None chooses what suits
            the model; what is left of the devices are replicas.
        serve_tensor: parts of heads, inner widths and vocabulary while samples are drawn; None chooses.
        serve_unrolled: draw samples from layers one by one, also with --scan-layers: on GPUs faster, slower to compile.
    """

    serve_expert: int | None = None
    serve_tensor: int | None = None
    serve_unrolled: bool = False

    def serving(self, architecture: ModelConfig, layout: Layout) -> Layout:
        """The layout that a model is sampled in on the devices of `layout`."""
        given = {"expert": self.serve_expert, "tensor": self.serve_tensor, "unrolled": self.serve_unrolled}
        return serving_layout(architecture, layout, **given)


@dataclass(frozen=True, kw_only=True)
class LoggingOptions:
    """Where numbers go beside metrics.jsonl and TensorBoard.

    Args:
        wandb_project: log to this project of Weights & Biases as well; needs pip install 'deepseek_jax[wandb]'.
        wandb_offline: keep its files in the run's folder, for `wandb sync`.
    """

    wandb_project: str | None = None
    wandb_offline: bool = False

    @property
    def wandb(self) -> WandbConfig | None:
        """The project to log to, if there is one."""
        return WandbConfig(project=self.wandb_project, offline=self.wandb_offline) if self.wandb_project else None


def whole_paths(values: Mapping[str, Any], *, lists: tuple[str, ...], single: tuple[str, ...]) -> dict[str, Any]:
    """Options that name files, of all that are given, with whole paths, which hold from any folder.

    Args:
        values: of the options, by name.
        lists: options of several names; a name that is no file, such as one on the hub, stays.
        single: options of one, or None.
    """
    path = lambda name: os.path.realpath(name) if os.path.exists(name) else name
    found: dict[str, Any] = {name: tuple(map(path, values[name])) for name in lists}
    return found | {name: values[name] and Path(path(values[name])) for name in single}


def enter(folder: Path, settings: RunSettings, text: str) -> str:
    """The run's identity; its settings are written into its folder, also as a file that repeats it."""
    run_id = enter_folder(folder, settings)
    write_whole(folder / "config.toml", text.encode())
    return run_id


def saved_dtype(asked: Precision, model: Path | None) -> jnp.dtype:
    """What the model's folder is written in: "auto" is what the model to start from names, and float32 without one."""
    if asked != "auto":
        return jnp.dtype(asked)
    return jnp.dtype("bfloat16" if model is not None and named_dtype(model) == "bfloat16" else "float32")
