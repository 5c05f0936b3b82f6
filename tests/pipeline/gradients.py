"""The gradients of every step of an epoch, as the training loop has them: run alone, or by torchrun.

gradients.py WORLD PROSE OUT PROJECT       then trains the run `long` of PROJECT
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from pipeline.config.recipes import Recipe
from pipeline.config.students import FCStudent, LlamaStudent
from pipeline.data.rows import load_rows
from pipeline.data.tokenizer import TextReader
from pipeline.objectives.base import Validation
from pipeline.runtime import hardware
from pipeline.streaming.batch import Stream
from pipeline.students.registry import build_student
from pipeline.teachers.record import teacher_reader
from pipeline.training.documents_workload import documents_workload
from pipeline.training.loop import TrainingSettings, fit
from pipeline.training.rows_workload import rows_workload
from pipeline.training.workload import TrainingData
from stages.train import main
from storage import Cache

STILL = 1e-30  # a learning rate that moves nothing


def measure(world: Path, prose: Path, out: Path) -> None:
    """Write the gradients (clipped) and the training losses of a classifier and of a language model."""
    rank, ranks = hardware.ranks()
    hardware.pin_threads(1)
    stream = Stream(rank, ranks)
    reader = teacher_reader(world / "teacher")
    rows, documents = load_rows(world / "data"), load_rows(prose / "data")
    fc = FCStudent(kind="fc", embedding=4, hidden=4, dropout=0.0)
    mixed = Recipe(alpha=0.3, temperature=2.0, pool=True, batch_rows=7, batch_tokens=40)
    llama = LlamaStudent(kind="llama", layers=1, width=16, heads=2, max_length=9)
    reviews = TrainingData(Cache.open(world / "cache"), rows, reader)
    pieces = TextReader(prose / "teacher", llama.max_length, "truncate")
    texts = TrainingData(Cache.open(prose / "cache"), documents, pieces)
    no_pool = mixed.model_copy(update={"pool": False})
    taught = [
        (fc, rows_workload(fc, mixed, reviews, 0, stream)),
        (llama, documents_workload(no_pool, texts, 0, stream)),
    ]
    for entry, lesson in taught:
        torch.manual_seed(0)
        num_ids = reader.num_ids if entry is fc else lesson.num_outputs
        model = build_student(entry, num_ids, lesson.num_outputs)
        seen: dict[str, torch.Tensor] = {}

        def look(
            optimizer: torch.optim.Optimizer, *_: object, model: torch.nn.Module = model,
            seen: dict[str, torch.Tensor] = seen,
        ) -> None:  # fmt: skip
            step = len(seen)
            seen.update(
                {f"{step}.{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

        handle = register_optimizer_step_pre_hook(look)
        settings = TrainingSettings(1, lesson.steps, STILL, 0.0, 0.0, 1, 99)
        done = fit(model, lesson.functions._replace(validate=lambda _: Validation(0.5, 1.0)), settings)
        handle.remove()
        seen["loss"] = torch.tensor([point["train_loss"] for point in done.curve])
        seen["rows"] = torch.tensor([done.rows_seen])
        save_file(seen, out / f"{entry.kind}-{rank}-of-{ranks}.safetensors")


if __name__ == "__main__":
    measure(*(Path(argument) for argument in sys.argv[1:4]))
    os.chdir(sys.argv[4])
    main("long")
    main("dropped")
