"""Caches at a URL: uploads them, and makes the directory that represents one on another machine.

    caches/NAME/remote.json    the URL, and the digest of the expected manifest

The digest determines every byte of the cache, so a run can depend on a directory with this one file as on the
whole cache: another cache at the URL is detected when it is opened.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from storage.checksums import check_files
from storage.disk import replaced_directory
from storage.errors import ManifestInvalid, Mismatch, NoManifest, SpecMismatch
from storage.fields import CacheUrl
from storage.fingerprints import Sha256, Strict, canonical_json
from storage.location import Url
from storage.manifest import MANIFEST_NAME
from storage.reader import LOCAL_COPIES, Cache
from storage.remote import Objects

RECEIVED_NAME = "remote.json"
MAX_BYTES = 2**16  # of a remote.json


class ReceivedFile(Strict):
    """The content of remote.json."""

    format: Literal["stillroom-remote"] = "stillroom-remote"
    format_version: Literal[1] = 1
    url: CacheUrl
    manifest: Sha256  # Cache.manifest_sha256


def publish(path: Path, url: Url, sent: Callable[[int], None] = lambda num_bytes: None) -> Cache:
    """Copy the cache in `path` to a URL, its manifest last; files that the manifest there lists are not sent
    again.

    `sent` is called with the bytes of each file. Raises what reading a damaged cache raises, and
    StoreUnreachable.
    """
    cache, objects = Cache.open(path), Objects(url)
    try:
        there = {file.path: file.sha256 for file in Cache.open(url).manifest.files}
    except NoManifest:
        there = {}
    for file in cache.manifest.files:
        if there.get(file.path) != file.sha256:
            check_files(path, [file])
            objects.write(file.path, path / file.path)
        sent(file.bytes)
    objects.write(MANIFEST_NAME, (path / MANIFEST_NAME).read_bytes())
    return cache


def receive(out: Path, url: str, manifest: str) -> None:
    """Make `out` a directory that represents the cache at `url`. Replaces what was there.

    Raises SpecMismatch where the manifest there has another digest, and what opening the cache raises.
    """
    file = ReceivedFile(url=url, manifest=manifest)
    _open(file, out, LOCAL_COPIES, None)
    with replaced_directory(out) as aside:
        (aside / RECEIVED_NAME).write_bytes(canonical_json(file.model_dump(mode="json")) + b"\n")


def open_received(path: Path, local: str | Path = LOCAL_COPIES, limit_bytes: int | None = None) -> Cache:
    """The cache that the directory `path` represents: see Cache.open.

    Raises ManifestInvalid for a damaged remote.json, and SpecMismatch where the URL has another cache now.
    """
    file = path / RECEIVED_NAME
    try:
        raw = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
        read = ReceivedFile.model_validate(json.loads(raw))
    except (OSError, ValidationError, ValueError, RecursionError) as error:
        raise ManifestInvalid(
            f"{file} does not name the URL of a cache: {error}.\n"
            f"Write it again: dvc repro receive@{path.name}"
        ) from None
    return _open(read, path, local, limit_bytes)


def _open(read: ReceivedFile, path: Path, local: str | Path, limit_bytes: int | None) -> Cache:
    cache = Cache.open(read.url, local, limit_bytes)
    if cache.manifest_sha256 != read.manifest:
        raise SpecMismatch(
            f"{read.url} has another cache than received.{path.name}",
            [Mismatch("manifest", cache.manifest_sha256, read.manifest)],
            f"To take the new one, write manifest: {cache.manifest_sha256} in params.yaml.",
        )
    return cache
