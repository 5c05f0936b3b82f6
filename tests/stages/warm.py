"""A Python that has imported torch already. Under DVC every stage starts a process, and in tests imports
would be most of its time.

`python -m stages.NAME` of a test becomes a request to a server, which forks: the child goes to the directory
of the request, takes its environment and files, and runs the module from there. The processes that stages
fork their seeds from are asked for in the same way. Libraries alone are imported before; the project's own
code is read from the project, as ever. Everything else, and all of it where STILLROOM_WARM is empty, is run
by the real interpreter.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

ADDRESS = "STILLROOM_WARM"
LIBRARIES = (
    "numpy", "pyarrow.parquet", "pyarrow.compute", "pydantic", "ruamel.yaml", "typer", "rich.progress",
    "torch", "torch._dynamo", "transformers.models.auto.modeling_auto", "accelerate", "safetensors.torch",
    "transformers.models.bert.modeling_bert", "sklearn.metrics", "matplotlib.figure", "jinja2", "zarr",
    "fsspec", "datasets", "onnxruntime.quantization",
)  # fmt: skip
CLIENT = """#!{python} -IS
import json, os, signal, socket, sys
what = [argument for argument in sys.argv[1:] if argument in ("-m", "-c")]
asked = sys.argv[sys.argv.index(what[0]):] if what else []
known = asked and asked[1].startswith({{"-m": "stages.", "-c": "from multiprocessing."}}[asked[0]])
if not os.environ.get("{address}") or not known:
    os.execv("{python}", ["{python}", *sys.argv[1:]])
files = [number for number in range(64) if os.path.exists(f"/proc/self/fd/{{number}}")]
with socket.socket(socket.AF_UNIX) as server:
    server.connect(os.environ["{address}"])
    asked = json.dumps([asked, os.getcwd(), dict(os.environ), files]).encode()
    socket.send_fds(server, [len(asked).to_bytes(8, "big")], files)
    server.sendall(asked)
    code = int(server.makefile().read() or -signal.SIGKILL)
os.kill(os.getpid(), -code) if code < 0 else sys.exit(code)
"""


@contextlib.contextmanager
def interpreter(directory: Path) -> Iterator[dict[str, str]]:
    """What has to be in the environment so that `python` is a warm one, for as long as this lasts."""
    directory.mkdir()
    address, client = directory / "socket", directory / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=ADDRESS))
    client.chmod(0o755)
    with subprocess.Popen([sys.executable, __file__, address], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == b"ready\n"
        yield {ADDRESS: str(address), "PATH": f"{directory}:{os.environ['PATH']}"}
        server.kill()


def serve(address: str) -> None:
    """Answer requests, each in a process of its own."""
    for name in LIBRARIES:
        __import__(name)
    import torch

    torch.onnx.export(torch.nn.Linear(1, 1).eval(), (torch.zeros(1, 1),), dynamo=True, verbose=False)
    multiprocessing.set_executable(str(Path(address).with_name("python")))
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        print("ready", flush=True)
        while True:
            request, _ = listening.accept()
            with request:
                if os.fork() == 0:
                    listening.close()
                    _answer(request)
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass


def _answer(request: socket.socket) -> None:
    """Run one stage in a child of this process, and tell its exit status."""
    head, files, _, _ = socket.recv_fds(request, 8, 64)
    size, body = int.from_bytes(head, "big"), b""
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
    _, status = os.waitpid(child, 0)
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
    sys.path[0] = place
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
    serve(sys.argv[1])
