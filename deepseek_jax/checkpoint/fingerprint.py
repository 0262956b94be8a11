"""What a model folder holds, as a short text: whether it is still the one that a run began with."""

from pathlib import Path

import xxhash

_BLOCK = 2**20
# Of larger folders every second, third, ... block is read.
_MOST_BYTES = 2**36
# Not part of the model: words about it, and the same weights in forms that are not read here.
_OTHERS = {".md", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack", ".png", ".jpg", ".pdf"}


def fingerprint(folder: Path) -> str:
    """A digest of the names, sizes and contents of a model's files, wherever the folder lies.

    Reads the whole of up to 64 GiB, which takes as long as the disk does; of more, blocks at even distances.

    Args:
        folder: Hugging Face or converted.
    """
    files = sorted((path.relative_to(folder).as_posix(), path) for path in folder.rglob("*") if _counts(path, folder))
    every = 1 + sum(path.stat().st_size for _, path in files) // _MOST_BYTES
    digest = xxhash.xxh3_128()
    for name, path in files:
        size = path.stat().st_size
        digest.update(f"{len(name)} {name} {size}\n".encode())
        with path.open("rb") as file:
            for at in range(0, size, every * _BLOCK):
                file.seek(at)
                digest.update(file.read(_BLOCK))
    return digest.hexdigest()


def _counts(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.suffix not in _OTHERS and path.is_file()
