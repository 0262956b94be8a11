"""Compiled programs kept for the next start: jax's persistent cache, in a folder of this user and this processor.

What is kept for a CPU is machine code, which jax loads on processors that cannot run it as well; so each kind of them
has a folder of its own. Importing this loads no jax.
"""

import hashlib
import os
import platform
import warnings
from importlib.util import find_spec
from pathlib import Path

_MOST = 4 << 30  # bytes; what was not used for longest goes first
_SECONDS = 10  # to wait for another process, as jax does
_ACCELERATORS = ("jax_plugins", "libtpu")


def keep_compiled() -> None:
    """Keep what is compiled from now on, and take what was kept; where that cannot be, a warning says so.

    `JAX_COMPILATION_CACHE_DIR` names another folder, which has the bound that the user gives it, and
    `JAX_COMPILATION_CACHE_MAX_SIZE` another bound; `JAX_ENABLE_COMPILATION_CACHE=0` keeps nothing. Several programs may
    do it at once.

    Source: docs.jax.dev, "Persistent compilation cache".
    """
    import jax  # no command is known to need it before

    if not jax.config.jax_enable_compilation_cache:
        return
    named = jax.config.jax_compilation_cache_dir
    settings = {"persistent_cache_min_compile_time_secs": 0.0}  # jax would leave out what takes less than a second
    try:
        if named:
            _refuse_unwritable(named)
        else:
            folder = _own(folder_of_user() / processor())
            if os.environ.get("JAX_COMPILATION_CACHE_MAX_SIZE") != "-1":  # without a bound jax writes no times
                _mend(folder)
            settings |= {"compilation_cache_dir": str(folder), "compilation_cache_max_size": _MOST}
    except (OSError, RuntimeError) as problem:
        jax.config.update("jax_enable_compilation_cache", False)
        warnings.warn(f"compiled programs are not kept: {problem}", stacklevel=2)
        return
    for name, value in settings.items():
        if f"JAX_{name.upper()}" not in os.environ:
            jax.config.update(f"jax_{name}", value)


def folder_of_user() -> Path:
    """Where programs are kept, a folder for each kind of processor.

    Raises:
        RuntimeError: there is no home to have it in.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "deepseek_jax" / "compiled"


def processor() -> str:
    """A name for processors that can do the same."""
    return hashlib.sha256(" ".join([platform.machine(), *_features()]).encode()).hexdigest()[:16]


def hush_loader() -> None:
    """Before jax is imported: no error is printed for each program that is taken, though all is well.

    Where there is AVX-512, XLA compiles for two preferences of LLVM, and later misses them among the processor's
    features (openxla/xla#44565). What really fails raises as ever.
    """
    of_cpu = os.environ.get("JAX_PLATFORMS") == "cpu" or not any(map(find_spec, _ACCELERATORS))
    if of_cpu and "avx512f" in _features():
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _features() -> list[str]:
    """Of the first processor, as Linux names them; other systems do not, nor do they share homes."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    named = (line.partition(":")[2] for line in lines if line.partition(":")[0].strip() in ("flags", "Features"))
    return sorted(next(named, "").split())


def _own(folder: Path) -> Path:
    """A folder that nobody else writes to: what is in it is run.

    Raises:
        OSError: it cannot be made, or others can write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "geteuid"):
        found = folder.stat()
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise OSError(f"{folder}: others can write to it, wanted a folder of your own; chmod go-w, or remove it")
    return folder


def _refuse_unwritable(named: str) -> None:
    """Raises OSError for a folder of this machine that cannot be made or written to."""
    if "://" not in named:
        os.makedirs(named, exist_ok=True)
        if not os.access(named, os.W_OK):
            raise OSError(f"{named}: cannot be written to; name another folder in JAX_COMPILATION_CACHE_DIR")


def _mend(folder: Path) -> None:
    """Without what a killed process left half written, which jax would neither take nor replace.

    Raises:
        OSError: nothing can be written there, or another process does not let go of it.
        NotImplementedError: files there cannot be locked.
    """
    from filelock import FileLock  # a tenth of a second that --help need not take

    with FileLock(folder / ".lockfile", timeout=_SECONDS):
        whole = {path.name.removesuffix("-atime") for path in folder.glob("*-atime")}  # written last
        for path in folder.glob("*-cache"):
            if path.name.removesuffix("-cache") not in whole:
                path.unlink()
