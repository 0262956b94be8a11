"""Accelerators in numbers: memory, bandwidth, peak speeds, links, and in what numbers they are had."""

import math
from dataclasses import dataclass
from typing import Literal

GB = 10**9
GIB = 2**30
TERA = 10**12
Kind = Literal["tpu", "gpu"]


@dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator. Peaks are the makers', dense; link speeds count both directions, all links of a chip together.

    Args:
        name: as `chip` takes it.
        kind: a TPU's slices have fixed shapes, GPUs come in nodes.
        hbm_bytes: memory.
        bandwidth: bytes/s between chip and memory.
        bf16_flops: FLOP/s of bfloat16 matrix products.
        flops_8bit: of FP8 products, of int8 on TPUs without them.
        link_bytes_per_s: fast link between the chips of an island.
        island: chips that the fast link joins.
        network_bytes_per_s: between islands, a chip, both directions; 400 Gbit/s each way where nothing is published.
        dimensions: of the torus; 0 for a switch.
        slices: in what numbers the planner looks for chips.
        devices: that JAX sees of one chip; each has its share of the memory, of the peaks and of the links.
    """

    name: str
    kind: Kind
    hbm_bytes: int
    bandwidth: float
    bf16_flops: float
    flops_8bit: float
    link_bytes_per_s: float
    island: int
    network_bytes_per_s: float = 100 * GB
    dimensions: int = 0
    slices: tuple[int, ...]
    devices: int = 1

    def slice_name(self, chips: int) -> str:
        """How so many chips are joined: the shape of a TPU slice as its topology is named, or nodes of GPUs.

        >>> chip("v5p").slice_name(64), chip("v5e").slice_name(32), chip("h100").slice_name(16)
        ('4x4x4', '4x8', '2 x 8')
        """
        if self.kind == "gpu":
            islands = next(n for n in range(math.ceil(chips / self.island), chips + 1) if chips % n == 0)
            return str(chips) if islands == 1 else f"{islands} x {chips // islands}"
        return "x".join(map(str, _shape(chips, self.dimensions)))

    def seconds_a_byte(self, members: int, together: int, *, exchange: bool = False) -> float:
        """Of a collective, for each byte that a device sends in a ring of all `members`, at the peaks of the links.

        What leaves an island goes over the network. Of a gather or a sum every island takes each byte in once, its
        devices sharing the work; of an exchange every device has something for every other.

        Args:
            members: devices of a group.
            together: of them, those of one island.
            exchange: whether it is an all-to-all.
        """
        away = 0.0
        if members > together:
            away = (members - together if exchange else members / together - 1) / (members - 1)
        fast, slow = (each / 2 / self.devices for each in (self.link_bytes_per_s, self.network_bytes_per_s))
        return max((1 - away) / fast, away / slow)

    def check(self, chips: int) -> None:
        """ValueError for a number of these chips that cannot be had."""
        if chips in self.slices:
            return
        if self.kind == "gpu" and chips > self.island and chips % self.island == 0:
            return
        more = f", or a multiple of {self.island}" if self.kind == "gpu" else ""
        listed = ", ".join(map(str, self.slices))
        raise ValueError(f"chips: got {chips}, wanted for {self.name} one of {listed}{more}")


def _shape(chips: int, dimensions: int) -> tuple[int, ...]:
    """Sides of the most even torus, powers of two, the shorter first; of a 3D one too small for it, the last is 1."""
    if dimensions == 3 and chips < 8:
        return {1: (1, 1, 1), 4: (2, 2, 1)}[chips]
    power = chips.bit_length() - 1
    share, more = divmod(power, dimensions)
    return tuple(2 ** (share + (side >= dimensions - more)) for side in range(dimensions))


def _doubling(first: int, last: int) -> tuple[int, ...]:
    return tuple(first << step for step in range((last // first).bit_length()))


_3D = (1, *_doubling(4, 4096))
_2D = (1, *_doubling(4, 256))
_GPUS = _doubling(1, 4096)
_BOX = _doubling(1, 8)  # GPUs on PCIe, in one machine
_CARD = 25 * GB  # between such machines: 100 Gbit/s each way

CHIPS: tuple[Chip, ...] = (
    Chip(
        name="v4",
        kind="tpu",
        hbm_bytes=32 * GIB,
        bandwidth=1.2 * TERA,
        bf16_flops=275 * TERA,
        flops_8bit=275 * TERA,
        link_bytes_per_s=600 * GB,  # six links of 400 Gbit/s each way
        island=4096,
        dimensions=3,
        slices=_3D,
    ),
    Chip(
        name="v5e",
        kind="tpu",
        hbm_bytes=16 * GB,
        bandwidth=0.819 * TERA,
        bf16_flops=197 * TERA,
        flops_8bit=393 * TERA,
        link_bytes_per_s=400 * GB,
        island=256,
        dimensions=2,
        slices=_2D,
    ),
    Chip(
        name="v5p",
        kind="tpu",
        hbm_bytes=95 * GIB,
        bandwidth=2.765 * TERA,
        bf16_flops=459 * TERA,
        flops_8bit=459 * TERA,
        link_bytes_per_s=1200 * GB,
        island=6144,
        dimensions=3,
        slices=_3D,
    ),
    Chip(
        name="v6e",
        kind="tpu",
        hbm_bytes=32 * GB,
        bandwidth=1.638 * TERA,
        bf16_flops=918 * TERA,
        flops_8bit=1836 * TERA,
        link_bytes_per_s=800 * GB,
        island=256,
        dimensions=2,
        slices=_2D,
    ),
    Chip(
        name="v7x",
        kind="tpu",
        hbm_bytes=192 * GIB,
        bandwidth=7.38 * TERA,
        bf16_flops=2307 * TERA,
        flops_8bit=4614 * TERA,
        link_bytes_per_s=1200 * GB,
        island=9216,
        dimensions=3,
        slices=_3D,
        devices=2,
    ),
    Chip(
        name="h100",
        kind="gpu",
        hbm_bytes=80 * GB,
        bandwidth=3.35 * TERA,
        bf16_flops=989 * TERA,
        flops_8bit=1979 * TERA,
        link_bytes_per_s=900 * GB,
        island=8,
        slices=_GPUS,
    ),
    Chip(
        name="h200",
        kind="gpu",
        hbm_bytes=141 * GB,
        bandwidth=4.8 * TERA,
        bf16_flops=989 * TERA,
        flops_8bit=1979 * TERA,
        link_bytes_per_s=900 * GB,
        island=8,
        slices=_GPUS,
    ),
    Chip(
        name="b200",
        kind="gpu",
        hbm_bytes=180 * GB,  # 180 to 192, by maker of the machine
        bandwidth=8 * TERA,
        bf16_flops=2250 * TERA,
        flops_8bit=4500 * TERA,
        link_bytes_per_s=1800 * GB,
        island=8,
        slices=_GPUS,
    ),
    Chip(
        name="gb200",
        kind="gpu",
        hbm_bytes=186 * GB,
        bandwidth=8 * TERA,
        bf16_flops=2500 * TERA,
        flops_8bit=5000 * TERA,
        link_bytes_per_s=1800 * GB,
        island=72,
        slices=_GPUS,
    ),
    Chip(
        name="mi300x",
        kind="gpu",
        hbm_bytes=192 * GB,
        bandwidth=5.3 * TERA,
        bf16_flops=1307 * TERA,
        flops_8bit=2615 * TERA,
        link_bytes_per_s=448 * GB,
        island=8,
        slices=_GPUS,
    ),
    Chip(
        name="a100",
        kind="gpu",
        hbm_bytes=80 * GB,
        bandwidth=2.039 * TERA,
        bf16_flops=312 * TERA,
        flops_8bit=624 * TERA,  # int8; FP8 it has not
        link_bytes_per_s=600 * GB,
        network_bytes_per_s=50 * GB,
        island=8,
        slices=_GPUS,
    ),
    Chip(
        name="l4",
        kind="gpu",
        hbm_bytes=24 * GB,
        bandwidth=0.3 * TERA,
        bf16_flops=121 * TERA,
        flops_8bit=242 * TERA,
        link_bytes_per_s=64 * GB,
        network_bytes_per_s=_CARD,
        island=8,
        slices=_BOX,
    ),
    Chip(
        name="l40s",
        kind="gpu",
        hbm_bytes=48 * GB,
        bandwidth=0.864 * TERA,
        bf16_flops=362 * TERA,
        flops_8bit=733 * TERA,
        link_bytes_per_s=64 * GB,
        network_bytes_per_s=_CARD,
        island=8,
        slices=_BOX,
    ),
    Chip(
        name="a10g",
        kind="gpu",
        hbm_bytes=24 * GB,
        bandwidth=0.6 * TERA,
        bf16_flops=70 * TERA,
        flops_8bit=140 * TERA,  # int8; FP8 it has not
        link_bytes_per_s=64 * GB,
        network_bytes_per_s=_CARD,
        island=8,
        slices=_BOX,
    ),
    Chip(
        name="rtx4090",
        kind="gpu",
        hbm_bytes=24 * GB,
        bandwidth=1.008 * TERA,
        bf16_flops=165 * TERA,
        flops_8bit=330 * TERA,
        link_bytes_per_s=64 * GB,
        network_bytes_per_s=_CARD,
        island=8,
        slices=_BOX,
    ),
    Chip(
        name="rtx5090",
        kind="gpu",
        hbm_bytes=32 * GB,
        bandwidth=1.792 * TERA,
        bf16_flops=209 * TERA,
        flops_8bit=419 * TERA,
        link_bytes_per_s=128 * GB,
        network_bytes_per_s=_CARD,
        island=8,
        slices=_BOX,
    ),
)

_ALIASES = {
    "v5litepod": "v5e",
    "v5-lite": "v5e",
    "trillium": "v6e",
    "ironwood": "v7x",
    "v7": "v7x",
    "7x": "v7x",  # tpu7x, as libtpu has it
    "h100-80": "h100",
    "h100-80gb": "h100",
    "h100-sxm": "h100",
    "h200-sxm": "h200",
    "nvl72": "gb200",
    "a100-80": "a100",
    "a100-80gb": "a100",
    "a100-sxm": "a100",
    "4090": "rtx4090",
    "rtx-4090": "rtx4090",
    "5090": "rtx5090",
    "rtx-5090": "rtx5090",
}


def chip(name: str) -> Chip:
    """A chip by name, in either case, with or without "tpu" before it. ValueError names those that there are.

    >>> chip("TPU v5p").hbm_bytes / 2**30, chip("Trillium").name
    (95.0, 'v6e')
    """
    asked = name.lower().replace("_", "-").replace(" ", "-").removeprefix("tpu").removeprefix("-")
    asked = _ALIASES.get(asked, asked)
    for known in CHIPS:
        if known.name == asked:
            return known
    raise ValueError(f"chip: got {name!r}, wanted one of {', '.join(known.name for known in CHIPS)}")
