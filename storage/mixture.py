"""Several caches read as one: the logits of several teachers for each row, and the weight of each teacher.

A mixture is a directory with mixture.json and the whole caches below it. It has no averages, because the mean
of probabilities depends on the temperature of the loss (MixedTargets of pipeline/losses).
docs/cache-format.md specifies it.

Shape letters: M caches, N rows, C classes.
"""

import json
import math
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from storage import manifest
from storage.disk import link, replaced_directory
from storage.errors import ManifestInvalid, Mismatch, SpecMismatch
from storage.fields import EntryName, Missing
from storage.fingerprints import Sha256, Strict, canonical_json, sha256_json
from storage.location import Location
from storage.reader import LOCAL_COPIES, Cache
from storage.received import RECEIVED_NAME, open_received
from storage.records import LogitRows
from storage.spec import Identity
from storage.tasks import STORED_TASKS

MIXTURE_NAME = "mixture.json"

MAX_MIXTURE_BYTES = 2**16
VERSION_1 = b'{"format":"stillroom-mixture","format_version":1,'

Version = Literal[1, 2]
VERSION: Version = 2  # 1 had no checksum


class MemberEntry(Strict):
    """One cache of a mixture: the directory of this name next to mixture.json."""

    name: EntryName
    weight: Annotated[float, Field(gt=0, le=1)]
    manifest: Sha256  # Cache.manifest_sha256


class MixtureFile(Strict):
    """The content of mixture.json."""

    format: Literal["stillroom-mixture"] = "stillroom-mixture"
    format_version: Literal[1, 2]
    members: Annotated[tuple[MemberEntry, ...], Field(min_length=2, max_length=100, strict=False)]
    missing: Missing

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if not math.isclose(sum(member.weight for member in self.members), 1, abs_tol=1e-9):
            raise ValueError(f"weights {[member.weight for member in self.members]} do not sum to 1")
        if len({member.name for member in self.members}) != len(self.members):
            raise ValueError("a cache is listed twice")
        return self


class Member(NamedTuple):
    """One cache of an open mixture."""

    name: str
    weight: float  # weights of all members sum to 1
    cache: Cache


class Mixture(Cache):
    """The first of several caches, read together with the others.

    What is one teacher's by nature (tokenizer, weights, hidden states, order of shards) is the first one's.
    """

    def __init__(self, root: Path, members: tuple[Member, ...], missing: Missing, version: Version) -> None:
        first = members[0].cache
        super().__init__(first.path, first.manifest, first.files)
        self.root, self.members, self.missing, self.version = root, members, missing, version

    @classmethod
    def open(
        cls, path: str | Location, local: str | Path = LOCAL_COPIES, limit_bytes: int | None = None
    ) -> Self:
        """The mixture at `path`. Raises ManifestInvalid, and what Cache.open raises for each cache in it."""
        root = Path(str(path))
        again = f"Copy it again (`dvc checkout --force {root}`), or mix it again: dvc repro mix@{root.name}"
        file = root / MIXTURE_NAME
        try:
            raw = file.read_bytes() if file.stat().st_size <= MAX_MIXTURE_BYTES else b""
            read = _parse(raw, file, again)
        except (OSError, RecursionError, ValueError) as error:
            if isinstance(error, ManifestInvalid):
                raise
            raise ManifestInvalid(f"{file} does not describe a mixture: {error}.\n{again}") from None
        members = tuple(Member(m.name, m.weight, Cache.open(root / m.name)) for m in read.members)
        wrong = [
            Mismatch(f"{member.name}.manifest", member.cache.manifest_sha256, entry.manifest)
            for member, entry in zip(members, read.members, strict=True)
            if member.cache.manifest_sha256 != entry.manifest
        ]
        if wrong:
            raise SpecMismatch(f"{root} has other caches than mixture.json lists", wrong, again)
        return cls(root, members, read.missing, read.format_version)

    @property
    def manifest_sha256(self) -> str:
        """sha256 hex of the content of mixture.json, which determines every byte of its caches."""
        return sha256_json(_file(self.members, self.missing, self.version))

    @property
    def weights_M(self) -> npt.NDArray[np.float32]:  # noqa: N802 (the letter of its shape)
        """The weight of each cache; they sum to 1."""
        return np.array([member.weight for member in self.members], np.float32)

    def check(
        self,
        what: str,
        *,
        identity: Identity | None = None,
        labels: Iterable[str] | None = None,
        row_ids: pa.StringArray | None = None,
        whole: bool = False,
        advice: str = "Choose a cache of this data, or rebuild it.",
    ) -> None:
        """Raise SpecMismatch for the first cache that does not fit `what`: see Cache.check."""
        for member in self.members:
            member.cache.check(
                what, identity=identity, labels=labels, row_ids=row_ids, whole=whole, advice=advice
            )

    def known(self, row_ids: pa.StringArray) -> npt.NDArray[np.bool_]:
        """Which of these rows every cache has a target for [N]."""
        held = np.ones(len(row_ids), bool)
        for member in self.members:
            found = pc.is_in(row_ids, value_set=member.cache.row_ids())
            held &= found.to_numpy(zero_copy_only=False)
        return held

    def others(self, row_ids: pa.StringArray) -> npt.NDArray[np.float32]:
        """Logits of these rows in all caches but the first [M - 1, N, C], in memory; 0 for missing rows."""
        logits_MNC = np.zeros((len(self.members) - 1, len(row_ids), len(self.labels)), np.float32)
        for logits_NC, member in zip(logits_MNC, self.members[1:], strict=True):
            for shard in member.cache.shards:
                held = member.cache.read(shard)
                assert isinstance(held, LogitRows)  # `mix` refuses others
                place = pc.index_in(row_ids, value_set=held.row_ids)
                here = place.is_valid().to_numpy(zero_copy_only=False)
                logits_NC[here] = held.logits[place.drop_null().to_numpy()]
        return logits_MNC


def open_cache(path: Path, limit_bytes: int | None = None) -> Cache:
    """The cache or the mixture in `path`, or the cache at a URL that it represents: see Cache.open."""
    if (path / RECEIVED_NAME).is_file():
        return open_received(path, limit_bytes=limit_bytes)
    return Mixture.open(path) if (path / MIXTURE_NAME).is_file() else Cache.open(path)


def mix(out: Path, caches: Mapping[str, tuple[Cache, float]], missing: Missing) -> Mixture:
    """Link caches into the directory `out` and write its mixture.json last. Replaces what was there.

    `caches` maps names to (cache or mixture, relative weight). A mixture counts as its caches, and a cache
    that occurs twice has both weights. Raises SpecMismatch where one cannot be averaged with the first: not
    dense, not one distribution a row, other labels, or labels in another order.
    """
    found: dict[str, Member] = {}
    total = sum(weight for _, weight in caches.values())
    for name, (cache, weight) in caches.items():
        for part in cache.members if isinstance(cache, Mixture) else (Member(name, 1.0, cache),):
            before = found[part.name].weight if part.name in found else 0.0
            found[part.name] = part._replace(weight=before + part.weight * weight / total)
    members = tuple(found.values())
    for member in members:
        _check_member(out.name, member, members[0])
    with replaced_directory(out) as aside:
        for member in members:
            shutil.copytree(_local_path(out.name, member), aside / member.name, copy_function=link)
        (aside / MIXTURE_NAME).write_bytes(manifest.checksummed(_file(members, missing, VERSION)))
    return Mixture.open(out)


def _local_path(name: str, member: Member) -> Path:
    """The directory of a member's cache. Raises SpecMismatch for a cache at a URL."""
    if isinstance(member.cache.path, Path):
        return member.cache.path
    raise SpecMismatch(
        f"mixtures.{name} cannot be made",
        [Mismatch(f"caches.{member.name}", member.cache.path, "a cache on this disk")],
        "A mixture contains its caches: copy this one here first.",
    )


def _file(members: Iterable[Member], missing: Missing, version: Version) -> dict[str, Any]:
    entries = tuple(
        MemberEntry(name=member.name, weight=member.weight, manifest=member.cache.manifest_sha256)
        for member in members
    )
    return MixtureFile(format_version=version, members=entries, missing=missing).model_dump(mode="json")


def _parse(raw: bytes, file: Path, again: str) -> MixtureFile:
    """The content of mixture.json. Raises ValueError, and ManifestInvalid for a wrong checksum."""
    if raw.startswith(VERSION_1):  # has no checksum, but is in canonical form
        read = MixtureFile.model_validate(json.loads(raw))
        written = canonical_json(read.model_dump(mode="json")) + b"\n"
    else:
        read = MixtureFile.model_validate(manifest.open_checksummed(raw, file, "stillroom-mixture", again))
        if read.format_version != VERSION:
            raise ValueError(f"format_version is {read.format_version}: that one has no checksum")
        written = manifest.checksummed(read.model_dump(mode="json"))
    if written != raw:
        raise ValueError("it is not in canonical form")
    return read


def _check_member(name: str, member: Member, first: Member) -> None:
    spec, faults = member.cache.identity.spec, []
    if not spec.stored.averaged:
        averaged = [task for task, stored in STORED_TASKS.items() if stored.averaged]
        faults.append(Mismatch("spec.task", spec.task, " or ".join(averaged)))
    if spec.sparse is not None:
        faults.append(Mismatch("spec.codec", spec.sparse.name, "dense"))
    if member.cache.labels != first.cache.labels:
        faults.append(Mismatch("spec.labels", list(member.cache.labels), list(first.cache.labels)))
    if faults:
        raise SpecMismatch(
            f"caches.{member.name} cannot be averaged with caches.{first.name} in mixtures.{name}",
            faults,
            "Probabilities are averaged class by class: mix dense caches of classifiers whose labels are the "
            "same, in the same order.",
        )
