"""Export a converted deepseek_jax folder as a Hugging Face checkpoint folder, every tensor as stored."""

from pathlib import Path

from deepseek_jax.checkpoint.convert import export_hf
from deepseek_jax.checkpoint.files import refuse_existing
from deepseek_jax.checkpoint.opened import open_folder
from deepseek_jax.checkpoint.recast import Format
from deepseek_jax.distributed import printable
from deepseek_jax.report.progress import Progress


def main(source: Path, target: Path, /, *, to: Format = "stored") -> None:
    """Export SOURCE to TARGET. As stored, these are the very files that were converted, byte for byte.

    Args:
        source: converted folder, as convert_hf.py writes it (a Hugging Face folder is taken too).
        target: folder to make; it must not exist, and it appears only when it is whole.
        to: format of the weights: as stored, unpacked to bfloat16 or float32, or packed as FP8; fp8-ue8m0 packs with
            powers of two as scales, as V3.1 has them.
    """
    refuse_existing(target, source)
    opened = open_folder(source, to=to)
    with Progress(opened.nbytes, "export", unit="bytes") as progress:
        export_hf(opened, target, advance=progress.advance)
    print(printable(f"wrote {target}"))
