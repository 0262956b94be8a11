"""Convert a Hugging Face checkpoint folder (safetensors) to a deepseek_jax folder (Orbax), every tensor as stored."""

from pathlib import Path

from deepseek_jax.checkpoint.folder import convert_hf
from deepseek_jax.cli import run


def main(source: Path, target: Path, /) -> None:
    """Convert SOURCE to TARGET.

    Args:
        source: Hugging Face folder with config.json and model*.safetensors.
        target: folder to make; it must not exist, and it appears only when it is whole.
    """
    convert_hf(source, target)
    print(f"wrote {target}")


if __name__ == "__main__":
    run(main)
