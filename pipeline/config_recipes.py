"""Entries of params.yaml: `recipes`, a mix of losses and how long to train with it."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.section import Fraction, Positive, Section


class Recipe(Section):
    """A mix of losses, alpha CE + (1 - alpha) T^2 KL, and how long to train with it."""

    alpha: Fraction = 0.5
    """Weight of the labels' cross-entropy; rows without a label give the KL part alone. 1: labels only."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """T of the KL part. The cache holds logits at T = 1."""
    divergence: Literal["forward", "reverse", "jsd", "skewed", "cosine", "mse"] = "forward"
    """Of student p from teacher t: KL(t || p), KL(p || t), Jensen-Shannon, or KL(t || skew t + (1 - skew) p).
    All but forward need a dense cache. Of several labels: forward, of each label's probability. Of numbers:
    mse. Of vectors: cosine, or mse."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the skewed divergence: the teacher's share of the mixture."""
    pool: bool = False
    """Train on the unlabelled pool too."""
    epochs: Positive = 5
    batch_rows: Positive = 64
    """Rows a step."""
    batch_tokens: Positive = 2048
    """Tokens a step, padding included, where there is a target a token; batch_rows then says nothing."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of a language model's training. auto: what a step is fastest in here, measured at the start."""
    warmup: Fraction = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    evaluations_per_epoch: Positive = 2
    patience: Positive = 4
    """Evaluations without improvement before it stops. The best state is kept."""

    @model_validator(mode="after")
    def _pool_needs_a_teacher(self) -> "Recipe":
        if self.pool and self.alpha == 1:
            raise ValueError(
                "alpha 1 trains on labels only, and the pool has none: set alpha below 1, or pool: false"
            )
        return self
