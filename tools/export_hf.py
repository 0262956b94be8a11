"""Export a converted deepseek_jax folder as a Hugging Face checkpoint folder, every tensor as stored."""

from pathlib import Path

from deepseek_jax.checkpoint.folder import export_hf
from deepseek_jax.cli import run


def main(source: Path, target: Path, /) -> None:
    """Export SOURCE to TARGET.

    Args:
        source: converted folder, as convert_hf.py writes it (a Hugging Face folder is taken too).
        target: folder to make; it must not exist, and it appears only when it is whole.
    """
    export_hf(source, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    run(main)
