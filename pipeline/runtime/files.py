"""Files written whole, and digests of directories."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write `value` where people and `dvc metrics` read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")


def content_digest(*directories: Path, pattern: str = "*") -> str:
    """sha256 hex over the names and bytes of all files below these directories."""
    digest = hashlib.sha256()
    for directory in directories:
        for path in sorted(path for path in directory.rglob(pattern) if path.is_file()):
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(directory.parent)} {own}\n".encode())
    return digest.hexdigest()


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_or_copy(source: Path, target: Path) -> None:
    """One file under two names, or a copy where the file system cannot."""
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
