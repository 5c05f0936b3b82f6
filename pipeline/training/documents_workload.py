"""The workload of a language model: states of each token through the head, against next token and entries.

Shape letters: T targets, D width of a state, V vocabulary.
"""

from typing import cast

import torch

from pipeline.config.recipes import Recipe
from pipeline.config.schedules import value_at
from pipeline.losses.sparse import SparseTargets
from pipeline.objectives.base import Validation
from pipeline.objectives.language_model import BY_LOSS, HeadInputs, fused_loss, score_documents
from pipeline.streaming.batch import ALONE, DistillBatch, Stream
from pipeline.streaming.decoded_shards import SCRATCH, DecodedShards
from pipeline.streaming.documents import CachedDocuments
from pipeline.streaming.model_inputs import call_model, unwrapped
from pipeline.students.base import LanguageModelStudent
from pipeline.training.workload import TrainingData, Workload, training_splits

VALIDATION_TOKENS = 4096  # a batch


def documents_workload(recipe: Recipe, data: TrainingData, seed: int, stream: Stream = ALONE) -> Workload:
    """The workload of documents, read in pieces of at most the reader's `max_length` tokens."""
    cache, rows, reader = data
    spool = DecodedShards(SCRATCH, stream.decoded_bytes)  # training and validation rows share shards
    cached = CachedDocuments(
        cache, rows, training_splits(recipe), reader.max_length, stream=stream, spool=spool
    )
    held_out = CachedDocuments(cache, rows, ("validation",), reader.max_length, spool=spool)
    sampled = cache.identity.spec.sampled

    def validate(model: torch.nn.Module) -> Validation:
        return score_documents(model, held_out.in_order(VALIDATION_TOKENS)).validation

    return Workload(
        num_outputs=cache.identity.spec.num_outputs,
        num_targets=cached.num_targets,
        steps=cached.num_steps(seed, recipe.epochs, recipe.batch_tokens),
        batches=lambda epoch, start=0: cached.epoch(seed, epoch, recipe.batch_tokens, start),
        loss=lambda model, batch, done: language_loss(model, batch, value_at(recipe.alpha, done), sampled),
        validate=validate,
        by_loss=BY_LOSS,
        cut_rows=0,
        padding=cached.padding(seed, recipe.batch_tokens),
        rows_per_item=cached.num_rows / max(cached.num_pieces, 1),
    )


def language_loss(model: torch.nn.Module, batch: DistillBatch, alpha: float, sampled: bool) -> torch.Tensor:
    """`fused_loss` of the model's states on this batch."""
    assert isinstance(batch.teacher, SparseTargets)  # caches of documents have no dense targets
    states_TD = call_model(model, batch.inputs)[batch.mask]
    head_VD = cast(LanguageModelStudent, unwrapped(model)).head
    loss = fused_loss(HeadInputs(states_TD, head_VD), batch.labels_T, batch.teacher, alpha, sampled)
    return batch.shares[0] * loss if batch.whole else loss
