"""A real S3-compatible server for tests: moto's, in a process of its own, on a free port of loopback."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

BUCKET = "shelf"


class Server:
    """A running server. Its settings are those that s3fs and DVC read from the environment."""

    def __init__(self, log: Path) -> None:
        command = [Path(sys.executable).with_name("moto_server"), "--host", "127.0.0.1", "--port", "0"]
        with log.open("wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        self.log = log
        self.endpoint = self._address(log)
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": "toy",
            "AWS_SECRET_ACCESS_KEY": "toy",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "1",  # botocore's own; a test should not wait for what never comes
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        request = urllib.request.Request(f"{self.endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request).close()

    def _address(self, log: Path) -> str:
        deadline = time.monotonic() + 600
        while "Running on " not in (said := log.read_text()):
            assert self.process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.02)
        return said.partition("Running on ")[2].split()[0]

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let this process talk to this server."""
        for name, value in self.environment.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        forget_others(self.endpoint)


def forget_others(endpoint: str) -> None:
    """s3fs keeps its clients, which are dear to make: drop them where they talk to another endpoint."""
    from s3fs import S3FileSystem

    if endpoint != getattr(forget_others, "last", None):
        S3FileSystem.clear_instance_cache()
    forget_others.last = endpoint  # type: ignore[attr-defined]


def objects(below: str = "") -> dict[str, bytes]:
    """Every object of the bucket with its bytes."""
    from s3fs import S3FileSystem

    found = S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    return {
        path.removeprefix(f"{BUCKET}/"): found.cat_file(path)
        for path in sorted(found.find(f"{BUCKET}/{below}"))
    }


def upload(directory: Path, below: str) -> str:
    """Copy a directory to the bucket as people do; return its URL."""
    from s3fs import S3FileSystem

    S3FileSystem().put(f"{directory}/", f"{BUCKET}/{below}/", recursive=True)
    return f"s3://{BUCKET}/{below}"


def cloudless() -> dict[str, str]:
    """The environment without any setting of a cloud."""
    return {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
