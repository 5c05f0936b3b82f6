"""The location of a cache or a store: a local path, or a URL."""

from pathlib import Path
from typing import NamedTuple


class Url(NamedTuple):
    """A URL, with the parts of pathlib that messages need."""

    text: str

    @property
    def name(self) -> str:
        """Its last part."""
        return self.text.rpartition("/")[2]

    @property
    def parent(self) -> "Url":
        """All but its last part."""
        return Url(self.text.rpartition("/")[0])

    def __truediv__(self, below: str | Path) -> "Url":
        return Url(f"{self.text}/{below}")

    def __str__(self) -> str:
        return self.text


Location = Path | Url


def location(where: str | Path | Url) -> Location:
    """A Url for text like `s3://bucket/caches/reviews`, otherwise a local path."""
    if isinstance(where, str) and "://" in where and not where.startswith("file://"):
        return Url(where.rstrip("/"))
    return Path(where.removeprefix("file://")) if isinstance(where, str) else where
