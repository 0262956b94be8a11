"""What mkdocs asks before it writes a page: pages that lie elsewhere in the repository."""

from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COPIES = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "log.md": "experiments/LOG.md",
}


def on_files(files: Any, config: Any) -> Any:
    """Adds the repository's own pages, with links that lead from docs/."""
    from mkdocs.structure.files import File

    for page, source in COPIES.items():
        text = (ROOT / source).read_text(encoding="utf-8").replace("](docs/", "](")
        for other, origin in COPIES.items():
            text = text.replace(f"]({origin})", f"]({other})")
        files.append(File.generated(config, page, content=text))
    return files
