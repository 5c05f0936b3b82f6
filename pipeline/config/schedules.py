"""Numbers of a recipe that change over the steps of a training, or from row to row.

`done` is the share of the steps that is done: 0 at the first step, 1 at the last. A training that stops early
has used the first part of its schedules.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from pipeline.config.base import Fraction, Section

AboveZero = Annotated[float, Field(gt=0)]


class Schedule(Section):
    """A number that moves from one value to another while the student trains."""

    schedule: Literal["linear", "cosine", "wsd"]
    """linear: a straight line. cosine: half a wave, slow at both ends. wsd (warm-up, stable, decay; Hu et al.
    2024, arXiv:2404.06395): rises to the second value, stays there, and returns to the first."""
    start: float = Field(alias="from")
    end: float = Field(alias="to")
    warmup: Fraction = 0.1
    """Of wsd: the share of all steps in which the number rises."""
    decay: Fraction = 0.1
    """Of wsd: the share of all steps in which the number returns."""

    @model_validator(mode="after")
    def _shares_fit(self) -> "Schedule":
        if self.schedule != "wsd" and (given := self.model_fields_set & {"warmup", "decay"}):
            raise ValueError(f"{', '.join(sorted(given))}: only a wsd schedule has these; remove them")
        if self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup:g} and decay {self.decay:g} are more than all steps")
        return self

    def __str__(self) -> str:
        """In words."""
        return f"{self.schedule} from {self.start:g} to {self.end:g}"

    def at(self, done: float) -> float:
        """The number at this share of the training."""
        if self.schedule == "cosine":
            part = (1 - math.cos(math.pi * done)) / 2
        elif self.schedule == "linear":
            part = done
        elif done < self.warmup:
            part = done / self.warmup
        else:
            part = min(1.0, (1 - done) / self.decay) if self.decay else 1.0
        return self.start + (self.end - self.start) * part


class ByConfidence(Section):
    """A temperature for each row, by the teacher's confidence (losses.divergences.confidence_temperature)."""

    by: Literal["confidence"]
    low: AboveZero
    """Where all classes are equally likely to the teacher."""
    high: AboveZero
    """Where the teacher is certain of one class."""

    @model_validator(mode="after")
    def _low_is_lower(self) -> "ByConfidence":
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is more than high {self.high:g}: exchange them")
        return self

    def __str__(self) -> str:
        """In words."""
        return f"by confidence, {self.low:g} to {self.high:g}"


def bounds(value: float | Schedule | ByConfidence) -> tuple[float, ...]:
    """The smallest and largest values, in any order; the one value of a number."""
    if isinstance(value, Schedule):
        return value.start, value.end
    return (value.low, value.high) if isinstance(value, ByConfidence) else (value,)


def value_at(value: float | Schedule, done: float) -> float:
    """The value at this share of the training."""
    return value.at(done) if isinstance(value, Schedule) else value


def _shares(value: Schedule) -> Schedule:
    if not all(0 <= end <= 1 for end in bounds(value)):
        raise ValueError("both ends must be between 0 and 1")
    return value


def _above_zero(value: Schedule) -> Schedule:
    if not all(end > 0 for end in bounds(value)):
        raise ValueError("both ends must be greater than 0")
    return value


def _some_above_zero(value: Schedule) -> Schedule:
    if min(bounds(value)) < 0 or max(bounds(value)) == 0:
        raise ValueError("no end may be below 0, and one must be greater")
    return value


def _branch(value: Any) -> str:
    if isinstance(value, ByConfidence) or (isinstance(value, dict) and "by" in value):
        return "a row"
    return "a step" if isinstance(value, Schedule | dict) else "number"


def _branch_of_share(value: Any) -> str:
    return "number" if _branch(value) == "number" else "a step"


# Tags differ from the names of fields, so that config.base.describe_errors can leave them out of a place.
ShareOrSchedule = Annotated[
    Annotated[Fraction, Tag("number")] | Annotated[Schedule, AfterValidator(_shares), Tag("a step")],
    Discriminator(_branch_of_share),
]
_ScheduledWeight = Annotated[Schedule, AfterValidator(_some_above_zero), Tag("a step")]
WeightOrSchedule = Annotated[
    Annotated[AboveZero, Tag("number")] | _ScheduledWeight, Discriminator(_branch_of_share)
]
WeightOrNone = Annotated[
    Annotated[float, Field(ge=0), Tag("number")] | _ScheduledWeight, Discriminator(_branch_of_share)
]
Temperature = Annotated[
    Annotated[AboveZero, Tag("number")]
    | Annotated[Schedule, AfterValidator(_above_zero), Tag("a step")]
    | Annotated[ByConfidence, Tag("a row")],
    Discriminator(_branch),
]
