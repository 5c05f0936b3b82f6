"""Files and directories that are whole or not there: linked, flushed, renamed into place; full disks."""

import contextlib
import errno
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from storage.errors import StoreFull

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
STALE_SECONDS = 24 * 3600
REPLACED = "-replaced"  # ends the name of a directory that has made way for a new one


@contextlib.contextmanager
def disk_full_explained(where: Path) -> Iterator[None]:
    """Turn the system's errors of a full disk into StoreFull, which names the directory `where`."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StoreFull) or error.errno not in DISK_FULL:
            raise
        raise StoreFull(
            f"no space left while writing below {where}: {os.strerror(error.errno or 0)}.\n"
            "Finished shards are kept. Free some space and run the same command again: it reuses them."
        ) from error


@contextlib.contextmanager
def replaced_directory(out: Path) -> Iterator[Path]:
    """A new directory next to `out`; when the block ends, it is flushed to disk and renamed to `out`.

    Readers see the old directory or the new one, whole. After an error `out` is as it was. Removes what dead
    writers of `out` have left. Several processes may do this at once: the last one's directory stays.
    """
    aside = out.parent / f".{out.name}.{host_name()}.{os.getpid()}"
    shutil.rmtree(aside, ignore_errors=True)
    for other in out.parent.glob(f".{out.name}.*.*"):
        sweep_stale(other, *other.name.split(".")[-2:])
    aside.mkdir(parents=True)
    try:
        yield aside
        fsync_tree(aside)
        _rename_over(aside, out)
        fsync(out.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _rename_over(aside: Path, out: Path) -> None:
    """Rename a directory over another one that other processes may replace meanwhile."""
    old = aside.with_name(f"{aside.name}{REPLACED}")
    while True:
        with contextlib.suppress(FileNotFoundError):
            os.rename(out, old)
        shutil.rmtree(old, ignore_errors=True)  # another process may be sweeping it
        try:
            os.rename(aside, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def sweep_stale(aside: Path, host: str, pid: str) -> None:
    """Remove what a dead process of this host has left, or what is a day old.

    Another sweep may remove it at the same time.
    """
    with contextlib.suppress(FileNotFoundError):
        found = aside.lstat()
        stale = found.st_mtime < time.time() - STALE_SECONDS
        if stale or (host == host_name() and not _is_running(pid.removesuffix(REPLACED))):
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(aside, ignore_errors=True)
            else:
                aside.unlink()


def _is_running(pid: str) -> bool:
    """Whether a process of this host is running. Zombies are not."""
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError, ValueError):
        return True  # another user's process, or not a number: swept when it is a day old
    with contextlib.suppress(OSError):  # there is no /proc outside Linux
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return True


def link(source: str | Path, target: str | Path) -> None:
    """Give a file a second name; copy it where the file system cannot link."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in DISK_FULL:
            raise
        shutil.copyfile(source, target)  # another file system, or one without links


def link_all(source: Path, target: Path, names: Iterable[str]) -> None:
    """`link` files of a directory into another one, under the same relative names."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        link(source / name, target / name)


def host_name() -> str:
    """This machine's name, without dots."""
    return socket.gethostname().replace(".", "-") or "host"


def fsync_tree(root: Path) -> None:
    """Flush all files and directories below `root` to disk."""
    for directory, _, names in os.walk(root):
        for name in names:
            fsync(Path(directory) / name)
        fsync(Path(directory))


def fsync(path: Path) -> None:
    """Flush a file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
