"""Convert a Hugging Face folder (safetensors) to a deepseek_jax folder (Orbax), every tensor as stored."""

from pathlib import Path

from deepseek_jax.checkpoint.convert import convert_hf
from deepseek_jax.checkpoint.convert import verify as verify_tensors
from deepseek_jax.checkpoint.files import refuse_existing
from deepseek_jax.checkpoint.hub import model_folder
from deepseek_jax.checkpoint.model_folder import open_folder
from deepseek_jax.checkpoint.recast import Format
from deepseek_jax.distributed import printable
from deepseek_jax.report.progress import Progress


def main(model: Path, out: Path, /, *, to: Format = "stored", verify: bool = False) -> None:
    """Convert MODEL to OUT, in bounded memory. Killed at any moment, the same command goes on where it was.

    Args:
        model: Hugging Face folder with config.json and model*.safetensors, or a name on the hub.
        out: folder to make; it must not exist, and it appears only when it is whole.
        to: format of the weights: as stored, unpacked to bfloat16 or float32, or packed as FP8; fp8-ue8m0 packs with
            powers of two as scales, as V3.1 has them.
        verify: read the new folder again and hold every tensor against the checksum of what went in.
    """
    folder = model_folder(model)
    refuse_existing(out, folder)
    opened = open_folder(folder, to=to)
    with Progress(opened.nbytes, "convert", unit="bytes") as progress:
        convert_hf(opened, out, advance=progress.advance)
    if verify:
        written = open_folder(out)
        with Progress(written.nbytes, "verify", unit="bytes") as progress:
            verify_tensors(written.source, written.stored.hashes, advance=progress.advance)
    print(printable(f"wrote {out}"))
