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
        devices: that JAX sees of one chip, two of a v7x; each has its share of memory, peaks and links.
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


_SLICES = {2: (1, *_doubling(4, 256)), 3: (1, *_doubling(4, 4096))}  # of TPUs, by the dimensions of their torus
_MANY, _BOX = _doubling(1, 4096), _doubling(1, 8)  # GPUs in nodes of a cluster, and on PCIe in one machine
_CARD = 25  # GB/s between such machines, both directions: 100 Gbit/s each way


def _tpu(name: str, memory: int, tb_s: float, tflops: tuple[int, int], link: int, island: int, torus: int) -> Chip:
    return Chip(
        name=name,
        kind="tpu",
        hbm_bytes=memory,
        bandwidth=tb_s * TERA,
        bf16_flops=tflops[0] * TERA,
        flops_8bit=tflops[1] * TERA,
        link_bytes_per_s=link * GB,
        island=island,
        dimensions=torus,
        slices=_SLICES[torus],
        devices=2 if name == "v7x" else 1,
    )


def _gpu(
    name: str, gigabytes: int, tb_s: float, tflops: tuple[int, int], link: int, island: int = 8, network: int = 100
) -> Chip:
    return Chip(
        name=name,
        kind="gpu",
        hbm_bytes=gigabytes * GB,
        bandwidth=tb_s * TERA,
        bf16_flops=tflops[0] * TERA,
        flops_8bit=tflops[1] * TERA,
        link_bytes_per_s=link * GB,
        network_bytes_per_s=network * GB,
        island=island,
        slices=_BOX if network == _CARD else _MANY,
    )


# Memory, TB/s of it, dense TFLOP/s of bfloat16 and of 8 bits, GB/s of links; what these join.
CHIPS: tuple[Chip, ...] = (
    _tpu("v4", 32 * GIB, 1.2, (275, 275), 600, 4096, 3),  # six links of 400 Gbit/s each way
    _tpu("v5e", 16 * GB, 0.819, (197, 393), 400, 256, 2),
    _tpu("v5p", 95 * GIB, 2.765, (459, 459), 1200, 6144, 3),
    _tpu("v6e", 32 * GB, 1.638, (918, 1836), 800, 256, 2),
    _tpu("v7x", 192 * GIB, 7.38, (2307, 4614), 1200, 9216, 3),
    _gpu("h100", 80, 3.35, (989, 1979), 900),
    _gpu("h200", 141, 4.8, (989, 1979), 900),
    _gpu("b200", 180, 8, (2250, 4500), 1800),  # 180 to 192 GB, by maker of the machine
    _gpu("gb200", 186, 8, (2500, 5000), 1800, island=72),
    _gpu("mi300x", 192, 5.3, (1307, 2615), 448),
    _gpu("a100", 80, 2.039, (312, 624), 600, network=50),  # 8 bits are int8; FP8 it has not
    _gpu("l4", 24, 0.3, (121, 242), 64, network=_CARD),
    _gpu("l40s", 48, 0.864, (362, 733), 64, network=_CARD),
    _gpu("a10g", 24, 0.6, (70, 140), 64, network=_CARD),  # int8 too
    _gpu("rtx4090", 24, 1.008, (165, 330), 64, network=_CARD),
    _gpu("rtx5090", 32, 1.792, (209, 419), 128, network=_CARD),
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
