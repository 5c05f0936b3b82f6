"""Entries of params.yaml: `augmented`, a prepared dataset with views of its training rows.

A shelf of its own, and not a key of a dataset: DVC must watch the model that new words come from, and its
`foreach` knows no dependency that only some entries have.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from pipeline.section import Fraction, Name, Positive, Section

MOST_VIEWS = 255  # each has a stream of random numbers (draws.py)


class Augmented(Section):
    """The rows of a dataset as they are, and so many views of each training row, as rows of their own.

    Every word is exchanged for another, or left out, by chance; then words change places.
    """

    dataset: Name
    """Whose rows; of the task sequence-classification."""
    model: Annotated[str, Field(min_length=1)]
    """A directory of transformers that new words come from: local, or below assets/. DVC watches it. With
    replace: 0 nothing is read there; DVC wants a path all the same: data/NAME of the dataset will do."""
    views: Annotated[int, Field(ge=1, le=MOST_VIEWS)] = 1
    """Views of each training row. A recipe trains on so many of them as it says."""
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    replace: Fraction = 0.2
    """The chance of a word to be exchanged, where the model knows others for it."""
    delete: Fraction = 0.1
    """The chance of a word to be left out. One word stays at least."""
    swap: Fraction = 0.0
    """The chance of a word to change places with another one, wherever that stands."""
    words: Literal["embeddings", "mlm"] = "embeddings"
    """Where other words come from: neighbours of the word among the model's input embeddings, by cosine; or
    what its head for masked words expects in its place."""
    candidates: Positive = 10
    """So many other words, the best ones, of which one is drawn."""

    @model_validator(mode="after")
    def _some_change(self) -> Self:
        if self.replace + self.delete > 1:
            raise ValueError(f"replace {self.replace:g} and delete {self.delete:g} are more than 1 together")
        if not self.replace + self.delete + self.swap:
            raise ValueError("no view would differ from its row: set replace, delete or swap above 0")
        return self
