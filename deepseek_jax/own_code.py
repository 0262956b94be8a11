"""Running a Python file of the user's own, as `import` would."""

import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType


def run_file(file: Path, name: str, *, kind: str) -> ModuleType:
    """The module that a file is. It may do anything: only ever run what the user named.

    Args:
        file: of Python, which is there.
        name: of the module.
        kind: what the file is to hold, for the error.

    Raises:
        ValueError: it raises something; names the line.
    """
    path = file.resolve()
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as problem:  # the user's code may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(problem.__traceback__) if frame.filename == str(path)]
        place = f"{file}:{lines[-1]}" if lines else str(file)
        raise ValueError(f"{kind}: {place}: raised {type(problem).__name__}: {problem}; mend the file") from problem
    return module
