"""The command `stillroom`: what people run by hand, beside `dvc repro`.

None of it is a stage, since nothing depends on what it gives; none of it needs torch.
"""

from stages import cli
from stages.commands import gc, merge, predict, publish


def main() -> None:
    """The console script."""
    cli.run({"predict": predict.main, "merge": merge.main, "publish": publish.main, "gc": gc.main})


if __name__ == "__main__":
    main()
