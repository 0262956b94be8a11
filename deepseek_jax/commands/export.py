"""Write a model as a Hugging Face folder (safetensors): as stored, or in bfloat16, float32 or FP8."""

from pathlib import Path

from deepseek_jax.checkpoint.convert import export_hf
from deepseek_jax.checkpoint.files import refuse_existing
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.recast import Format
from deepseek_jax.distributed import printable
from deepseek_jax.report.progress import Progress


def main(model: Path, out: Path, /, *, to: Format = "stored") -> None:
    """Export MODEL to OUT. As stored, these are the very files that were converted, byte for byte.

    Args:
        model: converted folder, as `convert` writes it; a Hugging Face folder or a name on the hub is taken too.
        out: folder to make; it must not exist, and it appears only when it is whole.
        to: format of the weights: as stored, unpacked to bfloat16 or float32, or packed as FP8; fp8-ue8m0 packs with
            powers of two as scales, as V3.1 has them.
    """
    folder = model_folder(model)
    refuse_existing(out, folder)
    opened = open_folder(folder, to=to)
    with Progress(opened.nbytes, "export", unit="bytes") as progress:
        export_hf(opened, out, advance=progress.advance)
    print(printable(f"wrote {out}"))
