"""Seconds that a fresh Python takes to import the public names that need no torch, and what they load.

Each import runs in a process of its own, in turns; the figure is the least of the rounds, in seconds of one
processor, which other work on the machine changes little. `python` is an empty program. Last line: JSON with
the seconds.
"""

import resource
import subprocess
import sys
from pathlib import Path

import common

ROOT = Path(__file__).parent.parent
PROGRAMS = {
    "python": "pass",
    "import stillroom": "import stillroom",
    "stillroom.Cache": "import stillroom; stillroom.Cache",
    "stillroom.load_params": "import stillroom; stillroom.load_params",
    "stillroom --help": "import stages.main",
}
HEAVY = ("torch", "transformers", "zarr", "fsspec", "pyarrow.compute")
ROUNDS = 7
MOST_SECONDS = 0.6  # of stillroom.Cache


def seconds(program: str) -> float:
    """Processor seconds that Python takes for a program, its own start included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def loaded(program: str) -> list[str]:
    """Which of the heavy modules a program imports."""
    listing = f"{program}\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    command = [sys.executable, "-c", listing]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.split()


def main() -> None:
    rounds = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(ROUNDS)]
    best = {name: min(times[name] for times in rounds) for name in PROGRAMS}
    for name, program in PROGRAMS.items():
        print(f"{name:24} {best[name]:.2f} s  {' '.join(loaded(program))}")
    common.close({"seconds": best, "within_limit": best["stillroom.Cache"] < MOST_SECONDS})


if __name__ == "__main__":
    main()
