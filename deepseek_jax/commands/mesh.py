"""How a command's model lies on the devices: options that training commands share."""

from dataclasses import dataclass

import jax

from deepseek_jax import distributed
from deepseek_jax.sharding import AXES, Layout, Remat, lanes_of, make_mesh


@dataclass(frozen=True, kw_only=True)
class MeshOptions:
    """How the model is divided over devices, to train and to sample.

    Args:
        mesh_data: replicas of the model. The product of the five sizes of the mesh must be the number of devices of
            all processes; all 1 in one process is a run on its first device, however many there are.
        mesh_fsdp: parts that weights are cut into by their width, and batches by sample.
        mesh_expert: groups of devices that the experts are divided between; batches are cut by them as well.
        mesh_context: parts of every sequence, and of the weights' width.
        mesh_tensor: parts of heads, inner widths and vocabulary.
        serve_expert: groups that whole experts are divided between, with serve_tensor, while samples are drawn: on a
            mesh weights are moved to a layout of its own for that, in which none is gathered. None chooses what suits
            the model; what is left of the devices are replicas.
        serve_tensor: parts of heads, inner widths and vocabulary while samples are drawn; None chooses.
        serve_unrolled: draw samples from layers one by one, also with --scan-layers: on GPUs faster, slower to compile.
        scan_layers: layers of one kind are one stack, run by a scan: a deep model compiles in the time of one layer.
        remat: what the backward pass works out again: nothing, whole layers, or all of a layer but its attention.
    """

    mesh_data: int = 1
    mesh_fsdp: int = 1
    mesh_expert: int = 1
    mesh_context: int = 1
    mesh_tensor: int = 1
    serve_expert: int | None = None
    serve_tensor: int | None = None
    serve_unrolled: bool = False
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
