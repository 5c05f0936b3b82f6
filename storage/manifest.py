"""manifest.json: the description of a cache, written last. A directory without it is not a cache.

The file is exactly `render(manifest)`: canonical JSON whose `checksum` field is the sha256 of all the rest,
so a flipped byte anywhere in it is detected. Readers trust the manifest and never a directory listing.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PrivateAttr, StringConstraints, ValidationError, model_validator

from storage.compact import MAX_RANKED
from storage.errors import FormatTooNew, ManifestInvalid, NoManifest
from storage.fields import LayerNumber
from storage.fingerprints import Count, Sha256, Strict, canonical_json, sha256_json
from storage.location import Location, Url
from storage.spec import Identity

FORMAT = "stillroom-cache"
FORMAT_VERSION = 5  # the highest; each cache has the lowest that can describe it: needed_version
MANIFEST_NAME = "manifest.json"
# Fields that are left out where they are None.
OPTIONAL = ("ranks", "weights", "hidden_basis", "shard_table")
WEIGHTS_DIR = "weights"
WEIGHTS_FILES = (f"{WEIGHTS_DIR}/config.json", f"{WEIGHTS_DIR}/model.safetensors")
BASIS_DIR = "hidden-basis"
TOKENIZER_DIR = "tokenizer"
TABLE_NAME = "shards.parquet"
MOST_LISTED = 10_000  # shards that manifest.json lists; more are in a table next to it
MAX_MANIFEST_BYTES = 2**30  # larger ones are refused: the manifest of a billion rows is far smaller
# Values (numbers, strings, lists) take at least BYTES_A_VALUE bytes of a manifest on average, apart from
# SHORT_VALUES labels and ranks. "[],[],[]," would take fifty times its size in memory.
BYTES_A_VALUE, SHORT_VALUES = 16, 2**18

# Relative, forward slashes, no empty, "." or ".." part: a manifest can never name a file outside its cache.
RelativePath = Annotated[
    str,
    StringConstraints(
        pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]*(/[A-Za-z0-9_-][A-Za-z0-9._-]*)*$", max_length=300
    ),
]


class FileEntry(Strict):
    """One file of a cache, relative to the cache's root."""

    path: RelativePath
    bytes: Count
    sha256: Sha256


class ShardEntry(Strict):
    """One shard: its key (storage.spec.shard_key), its size, and the files that hold it."""

    key: Sha256
    rows: Annotated[int, Field(ge=1, le=2**31)]
    positions: Count
    inputs: Sha256  # over the input hashes of its rows, in order
    files: Annotated[tuple[FileEntry, ...], Field(min_length=1, max_length=10_000, strict=False)]

    @property
    def logits_path(self) -> str:
        """The path of this shard's Parquet file, relative to the cache's root."""
        return f"logits/{self.key}.parquet"

    @property
    def hidden_path(self) -> str:
        """The path of this shard's Zarr group, relative to the cache's root."""
        return f"hidden/{self.key}"


class WeightsEntry(Strict):
    """The teacher's weights that students may start from."""

    layers: Annotated[tuple[LayerNumber, ...], Field(min_length=1, strict=False)]
    files: Annotated[tuple[FileEntry, ...], Field(max_length=len(WEIGHTS_FILES), strict=False)]

    @model_validator(mode="after")
    def _known_files(self) -> Self:
        if tuple(file.path for file in self.files) != WEIGHTS_FILES:
            raise ValueError(f"files are not {' and '.join(WEIGHTS_FILES)}")
        return self


class Manifest(Strict):
    """The full description of a sealed cache. Field by field: docs/cache-format.md."""

    format: Literal["stillroom-cache"] = "stillroom-cache"
    format_version: Annotated[int, Field(ge=1)]
    identity: Identity
    dataset: Sha256  # storage.fingerprints.content_fingerprint of the rows
    shards: Annotated[tuple[ShardEntry, ...], Field(max_length=10_000_000, strict=False)]
    tokenizer_files: Annotated[tuple[FileEntry, ...], Field(max_length=100, strict=False)]
    provenance: dict[str, Any]  # versions, hardware, the teacher's score: to be read, in no fingerprint
    # Compact layouts: the most frequent ids first; shards store an id as its position in this list.
    ranks: Annotated[tuple[Count, ...], Field(max_length=MAX_RANKED, strict=False)] | None = None
    weights: WeightsEntry | None = None
    # Hidden states as principal components: the files of their mean and axes (storage.hidden.read_bases).
    hidden_basis: Annotated[tuple[FileEntry, ...], Field(max_length=100_000, strict=False)] | None = None
    # Of more shards than MOST_LISTED: the file that has them instead of `shards` (storage.shard_table).
    shard_table: FileEntry | None = None
    _table: Sequence[ShardEntry] = PrivateAttr(default=())

    @model_validator(mode="after")
    def _version_and_ranks_fit_the_codec(self) -> Self:
        codec = self.identity.spec.sparse
        if self.format_version != needed_version(self.identity, self.weights, self.shard_table):
            raise ValueError(f"format_version is {self.format_version}: not that of its content")
        known = None if codec is None else codec.ranks
        if known != (None if self.ranks is None else sha256_json(list(self.ranks))):
            raise ValueError("ranks are not those of the codec")
        if self.ranks is not None and len(set(self.ranks)) != len(self.ranks):
            raise ValueError("ranks have an id twice")
        if self.ranks and max(self.ranks) >= self.identity.spec.num_outputs:
            raise ValueError(f"ranks have ids outside the vocabulary of {self.identity.spec.num_outputs:,}")
        return self

    @model_validator(mode="after")
    def _shards_are_in_one_place(self) -> Self:
        if bool(self.shards) == (self.shard_table is not None):
            raise ValueError("shards are listed, or in a shard_table: one of the two")
        if self.shard_table is not None and self.shard_table.path != TABLE_NAME:
            raise ValueError(f"the shard_table is called {TABLE_NAME}")
        return self

    @model_validator(mode="after")
    def _components_have_their_basis(self) -> Self:
        kept = self.identity.spec.hidden
        if (kept is not None and kept.pca is not None) != (self.hidden_basis is not None):
            raise ValueError("hidden_basis and hidden.pca are not both there")
        if kept is not None and kept.pca is not None and kept.basis is None:
            raise ValueError("hidden.pca has no basis")
        if kept is not None and self.hidden_basis is not None:
            _check_listed("hidden_basis", self.hidden_basis, {f"{BASIS_DIR}/{f}" for f in kept.basis_files})
        return self

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        paths = [file.path for file in self.files]
        if len(set(paths)) != len(paths):
            raise ValueError("a file is listed twice")
        kept = self.identity.spec.hidden
        own = () if kept is None else kept.files
        for shard in self.shards:
            expected = {shard.logits_path, *(f"{shard.hidden_path}/{file}" for file in own)}
            _check_listed(f"shard {shard.key[:12]}", shard.files, expected)
        if stray := [f.path for f in self.tokenizer_files if not f.path.startswith(f"{TOKENIZER_DIR}/")]:
            raise ValueError(f"tokenizer_files lists a file that is not a tokenizer's: {stray[0]}")
        return self

    @property
    def files(self) -> tuple[FileEntry, ...]:
        """Every file of the cache but the manifest itself."""
        return tuple(file for shard in self.every_shard for file in shard.files) + self.own_files

    @property
    def own_files(self) -> tuple[FileEntry, ...]:
        """The files that belong to no shard."""
        own = self.tokenizer_files + (self.weights.files if self.weights else ()) + (self.hidden_basis or ())
        return own + ((self.shard_table,) if self.shard_table else ())

    @property
    def every_shard(self) -> Sequence[ShardEntry]:
        """The shards, in order, of the list or of the table (once it was read: `with_table`)."""
        return self._table or self.shards

    def with_table(self, table: Sequence[ShardEntry]) -> Self:
        """The same manifest, with the shards of its table."""
        self._table = table
        return self

    @property
    def num_rows(self) -> int:
        """Rows in all shards."""
        return sum(shard.rows for shard in self.every_shard)


def _check_listed(what: str, files: Iterable[FileEntry], expected: set[str]) -> None:
    """Raise ValueError where a list has not the expected files: every file that is read must be listed."""
    found = {file.path for file in files}
    if stray := found - expected:
        raise ValueError(f"{what} lists files that are not its own: {min(stray)}")
    if missing := expected - found:
        raise ValueError(f"{what} does not list its file {min(missing)}")


def needed_version(
    identity: Identity, weights: WeightsEntry | None, shard_table: FileEntry | None = None
) -> int:
    """The lowest format version that can describe a cache, so that old readers read all they can."""
    needed = [identity.spec.stored.format_version]
    if identity.spec.sparse is not None:
        needed.append(2)
    if weights is not None:
        needed.append(3)
    hidden = identity.spec.hidden
    if hidden is not None and hidden.of_version_4:
        needed.append(4)
    if shard_table is not None:
        needed.append(5)
    return max(needed)


def fields(manifest: Manifest) -> dict[str, Any]:
    """Everything that the checksum covers, without those of `OPTIONAL` that are None."""
    body = manifest.model_dump(mode="json")
    return {key: value for key, value in body.items() if value is not None or key not in OPTIONAL}


def render(manifest: Manifest) -> bytes:
    """The exact bytes of manifest.json: canonical JSON with its checksum, and a newline."""
    return checksummed(fields(manifest))


def load(cache: Path) -> Manifest:
    """The manifest of the cache at `cache`.

    Raises NoManifest, ManifestInvalid or FormatTooNew.
    """
    path = cache / MANIFEST_NAME
    if not cache.is_dir():
        raise NoManifest(
            f"there is no cache at {cache}.\n"
            f"Fetch it with `dvc pull {cache}`, or capture it with `dvc repro cache@{cache.name}`."
        )
    if not path.is_file():
        raise NoManifest(
            f"{path} is missing: {cache} is not a cache, or was never sealed.\n"
            f"It is written last. Run `dvc repro cache@{cache.name}` again: finished shards are reused."
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ManifestInvalid(f"{path} has {path.stat().st_size:,} bytes: more than a manifest may have.")
    return parse(path.read_bytes(), path)


def parse(raw: bytes, path: Location) -> Manifest:
    """The manifest in `raw`. Raises ManifestInvalid unless it is byte for byte what `render` writes."""
    again = f"Copy the cache again (`dvc checkout --force {path.parent}`), or rebuild it."
    if isinstance(path, Url):
        again = "Upload the cache again."
    body = open_checksummed(raw, path, FORMAT, again)
    version = body.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FormatTooNew(
            f"{path} has format version {version}; this Stillroom reads up to {FORMAT_VERSION}.\n"
            "Upgrade Stillroom, or have the cache written in the older format."
        )
    try:
        manifest = Manifest.model_validate(body)
        written = render(manifest)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        raise ManifestInvalid(
            f"{path}: {where}: {first['msg']} (of {error.error_count()} errors).\n{again}"
        ) from None
    except (ValueError, RecursionError) as error:  # provenance may have any content
        raise ManifestInvalid(f"{path} cannot be written again: {error}.\n{again}") from None
    if written != raw:
        raise ManifestInvalid(f"{path} is not in canonical form: it was edited or re-encoded.\n{again}")
    return manifest


def checksummed(body: dict[str, Any]) -> bytes:
    """The bytes of a file with its own checksum: canonical JSON, and a newline."""
    return canonical_json({**body, "checksum": sha256_json(body)}) + b"\n"


def open_checksummed(raw: bytes, path: Location, kind: str, again: str) -> dict[str, Any]:
    """The argument of `checksummed`, of the format `kind`. Raises ManifestInvalid with the advice `again`."""
    try:
        body = _read_json(raw)
        if not isinstance(body, dict) or body.get("format") != kind:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise ManifestInvalid(
                f"{path} does not describe a {kind.removeprefix('stillroom-')}: "
                f"format is {found!r:.80}, expected {kind!r}.\n{again}"
            )
        checksum, expected = body.pop("checksum", None), sha256_json(body)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ManifestInvalid):
            raise
        raise ManifestInvalid(f"{path} is not JSON: {error}.\n{again}") from None
    if checksum != expected:
        raise ManifestInvalid(
            f"{path} is damaged or was edited by hand.\n"
            f"  checksum found {checksum!r:.80}, expected {expected}\n{again}"
        )
    return body


def _read_json(raw: bytes) -> Any:
    """Raises ValueError for bytes that are not JSON, or would take far more memory than their number."""

    def refuse(token: str) -> Any:
        raise ValueError(f"{token} is not a number in JSON")

    values = sum(raw.count(mark) for mark in (b",", b"[", b"{"))
    if values > SHORT_VALUES + len(raw) // BYTES_A_VALUE:
        raise ValueError(f"{values:,} values in {len(raw):,} bytes are more than a manifest may have")
    return json.loads(raw, parse_constant=refuse)
