"""A flipped, cut or missing byte in any file of any kind of cache is refused by name; nothing reads it.

The caches are the golden ones of every format version, and a mixture. A damaged file is read through each
door that it can be read through, on a `Cache` of its own, so that none relies on what another one checked.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from storage import Cache
from storage.errors import CacheError, ManifestInvalid, ShardCorrupt, ShardMissing, ShardTruncated
from storage.files import LocalFiles
from storage.fingerprints import canonical_json, sha256_json
from storage.manifest import BASIS_DIR, MANIFEST_NAME, TABLE_NAME, ShardEntry
from storage.mixture import MIXTURE_NAME, Mixture, mix, open_cache
from storage.verify import verify
from storage.writer import Store
from tests.storage.conftest import IDENTITY, make_cache

GOLDEN = Path(__file__).parents[1] / "golden"
FLIPS = 2_400  # in all
LEAST_A_FILE = 8
OPENED = (MANIFEST_NAME, MIXTURE_NAME, TABLE_NAME)  # what opening a cache reads

Door = Callable[[Cache], object]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of every golden cache, and a mixture of two caches, that tests damage and restore."""
    root = tmp_path_factory.mktemp("shelf")
    for manifest in sorted(GOLDEN.rglob(MANIFEST_NAME)):
        shutil.copytree(manifest.parent, root / "-".join(manifest.parent.relative_to(GOLDEN).parts))
    one, two = (make_cache(root / "made" / name) for name in ("one", "two"))
    mix(root / "both", {"one": (one, 1.0), "two": (two, 3.0)}, "error")
    shutil.rmtree(root / "made")  # its files stay under their other names
    return root


def files(shelf: Path) -> Iterator[tuple[Path, Path]]:
    """Every (cache or mixture, file in it)."""
    for cache in sorted(shelf.iterdir()):
        for path in sorted(p for p in cache.rglob("*") if p.is_file()):
            yield cache, path


def shard_doors(shard: ShardEntry, states: bool) -> list[Door]:
    """What reads a shard's file."""
    if states:
        return [lambda c: [c.hidden(shard, name) for name in c.hidden_names]]
    return [lambda c: c.read(shard), lambda c: c.index(), lambda c: c.row_ids(), lambda c: c.input_hashes()]


def doors(cache: Cache, relative: str) -> list[Door]:
    """Everything that reads this file of a cache."""
    room = relative.split("/")[0]
    if room == TABLE_NAME:
        return [lambda c: Cache.open(c.path)]
    if room == "tokenizer":
        return [lambda c: c.tokenizer_dir, verify]
    if room == "weights":
        return [lambda c: c.weights_dir, verify]
    if room == BASIS_DIR:
        assert cache.identity.spec.hidden is not None
        name = cache.identity.spec.hidden.component_names[0]
        return [lambda c: c.hidden_basis(name)]
    shard = next(s for s in cache.shards if relative in [file.path for file in s.files])
    return shard_doors(shard, room == "hidden")


def the_cache_of(path: Path, root: Path) -> tuple[Path, str]:
    """(the directory of the cache of a file, its path there), also inside of a mixture."""
    here = next(d for d in path.parents if (d / MANIFEST_NAME).is_file() or d == root)
    return here, path.relative_to(here).as_posix()


def refuses(
    path: Path, root: Path, readers: list[tuple[Cache, list[Door]]], *errors: type[Exception]
) -> None:
    """Each door refuses, by the file's name; of a manifest the door is opening the cache."""
    own = path.name in OPENED
    for cache, ways in [(None, [lambda _: open_cache(root)])] if own else readers:
        for way in ways:
            fresh = None if cache is None else Cache(cache.path, cache.manifest, LocalFiles(Path(cache.path)))
            with pytest.raises(errors) as refused:
                way(fresh)
            assert isinstance(refused.value, CacheError)
            assert path.name in str(refused.value), "it is named"


def test_a_flipped_byte_anywhere_is_refused_through_every_door(shelf: Path) -> None:
    chosen = random.Random(6)
    everything = list(files(shelf))
    size = sum(path.stat().st_size for _, path in everything)
    flips, kinds = 0, set()
    for root, path in everything:
        sound = path.read_bytes()
        directory, relative = the_cache_of(path, root)
        kinds.add("logits" if path.parent.name == "logits" else path.name)
        readers: list[tuple[Cache, list[Door]]] = []
        if path.name not in OPENED:
            cache = Cache.open(directory)
            readers = [(cache, doors(cache, relative))]
        many = min(len(sound), max(LEAST_A_FILE, FLIPS * len(sound) // size))
        for offset in chosen.sample(range(len(sound)), many):
            path.write_bytes(
                sound[:offset] + bytes([sound[offset] ^ 1 << chosen.randrange(8)]) + sound[offset + 1 :]
            )
            refuses(path, root, readers, ManifestInvalid, ShardCorrupt)
            flips += 1
        path.write_bytes(sound)
    assert flips >= 2_000
    assert kinds >= {
        *OPENED, "logits", "zarr.json", "c.0.0", "c.0", "tokenizer.json", "config.json",
        "model.safetensors",
    }  # fmt: skip
    for root in sorted(shelf.iterdir()):
        sound_again(root)


def sound_again(root: Path) -> None:
    """Nothing is refused where nothing is damaged."""
    opened = open_cache(root)
    for cache in [m.cache for m in opened.members] if isinstance(opened, Mixture) else [opened]:
        verify(cache)
        for file in cache.manifest.files:
            for way in doors(cache, file.path):
                way(Cache(cache.path, cache.manifest, LocalFiles(Path(cache.path))))


def test_a_file_that_is_cut_anywhere_grown_or_gone_is_refused(shelf: Path) -> None:
    chosen = random.Random(7)
    for root, path in files(shelf):
        sound = path.read_bytes()
        directory, relative = the_cache_of(path, root)
        cache = None if path.name in OPENED else Cache.open(directory)
        # Shards that are in a table are looked at when they are read.
        at_once = not (directory / TABLE_NAME).is_file() or relative.split("/")[0] not in ("logits", "hidden")
        cuts = {0, 1, len(sound) // 2, len(sound) - 1, chosen.randrange(len(sound))}
        for damaged in [*(sound[:cut] for cut in sorted(cuts)), sound + b"\0", sound + sound]:
            path.write_bytes(damaged)
            if at_once:
                with pytest.raises((ManifestInvalid, ShardTruncated), match=path.name):
                    open_cache(root)
            if cache is not None:  # cut after it was opened
                refuses(path, root, [(cache, doors(cache, relative))], ShardTruncated)
        path.unlink()
        # Without mixture.json a mixture is not a cache either.
        if at_once:
            with pytest.raises(CacheError, match=path.name if path.name != MIXTURE_NAME else MANIFEST_NAME):
                open_cache(root)
        if cache is not None:
            refuses(path, root, [(cache, doors(cache, relative))], ShardMissing)
        path.write_bytes(sound)


def test_a_mixture_without_a_checksum_is_read_and_keeps_its_name(shelf: Path) -> None:
    path = shelf / "both" / MIXTURE_NAME
    sound = path.read_bytes()
    body = json.loads(sound)
    body.pop("checksum")
    body["format_version"] = 1
    path.write_bytes(canonical_json(body) + b"\n")
    opened = open_cache(shelf / "both")
    assert isinstance(opened, Mixture)
    assert [member.weight for member in opened.members] == [0.25, 0.75]
    assert opened.manifest_sha256 == sha256_json(body)
    for change, message in {
        '"weight":0.35': "do not sum to 1",
        '"weight": 0.25': "canonical",
        '"weight":0.25,"more":1': "more",
    }.items():
        path.write_bytes(canonical_json(body).replace(b'"weight":0.25', change.encode()) + b"\n")
        with pytest.raises(ManifestInvalid, match=rf"mixture\.json .*(?s:.)*{message}"):
            open_cache(shelf / "both")
    path.write_bytes(sound)


def test_a_flipped_byte_in_a_stores_table_of_frequent_ids_is_refused(tmp_path: Path) -> None:
    store, chosen = Store(tmp_path), random.Random(8)
    table = store.keep_ranks(IDENTITY, np.array([5, 3, 17, 2]))
    (path,) = tmp_path.glob("ranks/*.json")
    sound = path.read_bytes()
    places = [(0, 1 << bit) for bit in range(8)]  # one of them makes a list of it
    places += [(place, 1 << chosen.randrange(8)) for place in range(1, len(sound) - 1)]
    for place, bit in places:  # the newline behind it says nothing
        path.write_bytes(sound[:place] + bytes([sound[place] ^ bit]) + sound[place + 1 :])
        with pytest.raises(ManifestInvalid, match=rf"{path.name} .*(?s:.)*Remove it"):
            store.ranks(IDENTITY)
    path.write_bytes(b"[5,3,17,2]")  # of before there were checksums
    assert np.array_equal(store.ranks(IDENTITY), table)
