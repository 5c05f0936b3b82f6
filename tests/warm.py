"""A Python that has imported torch, Dask and DVC already: tests start many processes, and imports would be
most of their time.

`python -m MODULE` and `dvc` of a test become a request to a server, which forks: the child goes to the
directory of the request, takes its environment and files, and runs the module from there. The processes that
stages fork their seeds from, and Dask its workers, are requested in the same way. Only libraries are imported
before; the project's own code is read from the project. A child ends when its client is killed. Every other
program, and every program where STILLROOM_WARM is empty, is run by the real interpreter.
"""

import contextlib
import fcntl
import gc
import json
import multiprocessing
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil

ADDRESS, MARK = "STILLROOM_WARM", "warm:"
LIBRARIES = (
    "numpy", "pyarrow.parquet", "pyarrow.compute", "pyarrow.dataset", "pandas", "pydantic", "ruamel.yaml",
    "typer", "rich.progress", "torch", "torch._dynamo", "transformers.models.auto.modeling_auto",
    "accelerate", "safetensors.torch", "transformers.models.bert.modeling_bert", "sklearn.metrics",
    "matplotlib.figure", "jinja2", "zarr", "fsspec", "datasets", "onnxruntime.quantization",
    "torch.distributed.run", "distributed", "s3fs", "networkx", "pygit2", "scmrepo.git", "dvc.cli.parser",
    "dvc.repo.reproduce", "dvc.repo.graph", "dvc.repo.push", "dvc.repo.pull", "dvc.repo.metrics.show",
    "dvc.repo.plots", "dvc.repo.experiments", "dvc.render.convert", "dvc.utils.strictyaml",
    "dvc_data.index.push", "dvc_data.index.fetch",
)  # fmt: skip
MODULES = ("stages.", "tests.", "dvc", "distributed.", "torch.distributed.")
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
what = [argument for argument in sys.argv[1:] if argument in ("-m", "-c")]
request = ["-m", "dvc", *sys.argv[1:]] if {dvc} else sys.argv[sys.argv.index(what[0]):] if what else []
known = request and request[1].startswith({{"-m": {modules}, "-c": "from multiprocessing."}}[request[0]])
if not os.environ.get("{address}") or not known:
    command = ["{python}", *(["-m", "dvc"] if {dvc} else []), *sys.argv[1:]]
    os.execv("{python}", command)
files = [number for number in range(64) if os.path.exists(f"/proc/self/fd/{{number}}")]
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["{address}"])
    request = json.dumps([request, os.getcwd(), dict(os.environ), files]).encode()
    socket.send_fds(server, [len(request).to_bytes(8, "big")], files)
    server.sendall(request)
    answer = server.makefile()
    with open("/proc/self/comm", "w") as name:
        name.write("{mark}" + answer.readline())
    code = int(answer.read() or -signal.SIGKILL)
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@contextlib.contextmanager
def using(directory: Path) -> Iterator[dict[str, str]]:
    """What the environment must hold so that `python` and `dvc` are warm ones, for as long as this lasts.

    Processes that give the same directory share a server; it ends when the last of them is gone.
    """
    directory.mkdir(exist_ok=True)
    address = directory / "socket"
    with (directory / "users").open("w") as users, (directory / "starting").open("w") as starting:
        fcntl.flock(users, fcntl.LOCK_SH)
        fcntl.flock(starting, fcntl.LOCK_EX)
        with socket.socket(socket.AF_UNIX) as trying:
            if trying.connect_ex(str(address)):
                _start(directory, address)
        fcntl.flock(starting, fcntl.LOCK_UN)
        yield {
            ADDRESS: str(address),
            "PATH": f"{directory}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }


def python() -> str:
    """The program that runs Python for tests: a warm one where the environment has it."""
    address = os.environ.get(ADDRESS)
    return str(Path(address).with_name("python")) if address else sys.executable


def served(pid: int) -> int:
    """The process that does what this one requested of a server; this one where it did not."""
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
        return int(name.removeprefix(MARK)) if name.startswith(MARK) else pid
    return pid


def children(pid: int) -> list[int]:
    """What a process started, itself or through a server."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return [served(child.pid) for child in psutil.Process(served(pid)).children()]
    return []


def family(pid: int) -> list[int]:
    """A process and all that it started, each before what it started."""
    return [pid, served(pid), *(one for child in children(pid) for one in family(child))]


def kill(pid: int) -> list[int]:
    """SIGKILL a process and all that it started; returns which they were."""
    found = family(pid)
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    return found


def _start(directory: Path, address: Path) -> None:
    for name in ("python", "dvc"):
        program = CLIENT.format(
            python=sys.executable, address=ADDRESS, dvc=name == "dvc", modules=MODULES, mark=MARK
        )
        (directory / name).write_text(program)
        (directory / name).chmod(0o755)
    address.unlink(missing_ok=True)
    environment = os.environ | {"HF_HOME": str(directory / "hf")}
    subprocess.run([sys.executable, __file__, address], check=True, stdin=subprocess.DEVNULL, env=environment)


def serve(address: Path) -> None:
    """Answer requests, each in a process of its own, until there are no users."""
    gc.disable()
    for name in LIBRARIES:
        __import__(name)
    import torch

    torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.zeros(1, 1),), dynamo=True, verbose=False)
    gc.freeze()  # children do not look at what is here, which would copy it
    gc.enable()
    multiprocessing.set_executable(str(address.with_name("python")))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as listening, address.with_name("users").open() as users:
        listening.bind(str(address))
        listening.listen()
        if os.fork():
            os._exit(0)  # the process that started it waits for this
        while True:
            ready, _, _ = select.select([listening], [], [], 2)
            if ready:
                _accept(listening)
            else:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os._exit(0)  # threads of libraries did not come along: there is nothing to wait for
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _accept(listening: socket.socket) -> None:
    """Have one request answered by a child."""
    request, _ = listening.accept()
    with request:
        head, files, _, _ = socket.recv_fds(request, 8, 64)
        if head and os.fork() == 0:
            listening.close()
            _answer(request, int.from_bytes(head, "big"), files)
        for file in files:
            os.close(file)


def _answer(request: socket.socket, size: int, files: list[int]) -> None:
    """Run one program in a child, which ends where the client is killed; send its exit status."""
    body = b""
    while len(body) < size:
        body += request.recv(2**16)
    arguments, place, environment, numbers = json.loads(body)
    child = os.fork()
    if child == 0:
        request.close()
        _put(files, numbers)
        os._exit(_run(arguments, place, environment))
    for file in files:
        os.close(file)
    request.sendall(f"{child}\n".encode())
    ended, _, _ = select.select([os.pidfd_open(child), request], [], [])
    if request in ended:
        os.kill(child, signal.SIGKILL)  # it is there until this process waits for it
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        request.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    request.close()
    os._exit(0)


def _put(files: list[int], numbers: list[int]) -> None:
    """Give these files the numbers that they had where the request came from."""
    clear = max(*files, *numbers) + 1
    aside = [fcntl.fcntl(file, fcntl.F_DUPFD, clear) for file in files]
    for file in files:
        os.close(file)
    for file, number in zip(aside, numbers, strict=True):
        os.dup2(file, number)
        os.close(file)


def _run(arguments: list[str], place: str, environment: dict[str, str]) -> int:
    how, what, *rest = arguments
    os.chdir(place)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.path[:1] = [place, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.argv = [what, *rest]
    code = 0
    try:
        if how == "-c":
            exec(what, {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
