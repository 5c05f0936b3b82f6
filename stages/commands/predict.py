"""`stillroom predict RUN TEXT`: label texts with an exported student, without torch."""

import json
import sys
from typing import Annotated

import typer

from pipeline.config.load import load_params
from pipeline.config.params import PARAMS
from pipeline.export.predictor import Predictor, find_export
from stages import cli, paths
from storage.errors import ConfigError


def main(
    run: Annotated[str, typer.Argument(help="Name of a run, or the directory of an export.")],
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts to label; without any, lines of standard input.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object for each text.")] = False,
    float32: Annotated[
        bool, typer.Option("--float32", help="The float32 model; the default is int8.")
    ] = False,
) -> None:
    """Label texts with an exported student."""
    if not texts and sys.stdin.isatty():
        raise ConfigError(
            f"there is no text: write `stillroom predict {run} TEXT`, or pipe in lines of text."
        )
    directory = find_export(
        run, paths.EXPORTED, lambda: load_params().everything_trained if PARAMS.is_file() else ()
    )
    model = Predictor(directory, "float32" if float32 else "int8")
    for text in texts or (line.rstrip("\n") for line in sys.stdin):
        prediction = model.predict(text)
        if as_json:
            print(json.dumps(prediction._asdict(), ensure_ascii=False), flush=True)
        else:
            shares = "  ".join(f"{label} {share:.1%}" for label, share in prediction.probabilities.items())
            print(f"{prediction.label}\t{shares}", flush=True)


if __name__ == "__main__":
    cli.run(main)
