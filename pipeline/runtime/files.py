"""JSON files for people, and digests of directories."""

import hashlib
import json
from pathlib import Path
from typing import Any


def write_json(value: dict[str, Any], path: Path, ensure_ascii: bool = True) -> None:
    """Write `value` indented, for people and for `dvc metrics`. Makes the directory where it is missing.

    `ensure_ascii=False` keeps letters outside ASCII readable. Raises ValueError for NaN and infinities, which
    JSON does not have.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, ensure_ascii=ensure_ascii, allow_nan=False)
    path.write_text(text + "\n")


def content_digest(*directories: Path, pattern: str = "*") -> str:
    """sha256 hex over the names and bytes of all files below these directories."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(path for path in directory.rglob(pattern) if path.is_file()):
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(directory.parent)} {own}\n".encode())
    return digest.hexdigest()
