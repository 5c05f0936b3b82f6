"""`stillroom publish NAME URL`: copy a sealed cache to a bucket, for machines that train from it."""

from pipeline.runtime.progress import bar
from stages import cli, paths
from storage import Cache
from storage.errors import ConfigError
from storage.location import Url, location
from storage.received import publish


def main(name: str, url: str) -> None:
    """Copy a sealed cache to a URL, and print the entry of params.yaml that receives it."""
    where = location(url)
    if not isinstance(where, Url):
        raise ConfigError(f"{url} is not the URL of a bucket, like s3://bucket/caches/{name}.")
    total = sum(file.bytes for file in Cache.open(paths.CACHES / name).manifest.files)
    with bar(f"publishing {name}", total, "bytes") as advance:
        cache = publish(paths.CACHES / name, where, advance)
    print(f'received:\n  {name}: {{url: "{where}", manifest: {cache.manifest_sha256}}}')


if __name__ == "__main__":
    cli.run(main)
