"""Students by a transformers config: any architecture that transformers has a classifier of rows for.

The entry gives `model_type` and the config's own keys; vocabulary, padding, labels and positions are set
here. Imports transformers where it is called: other students do not need the library.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config.base import did_you_mean
from pipeline.config.students import TransformersStudent
from storage.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig


POSITIONS_KEY = "max_position_embeddings"
SPARE_POSITIONS = 2  # the RoBERTas count positions from behind the padding id
TOLERANCE = 1e-4  # of logits near 1, between a row alone and the same row padded


def student_config(
    entry: TransformersStudent, num_ids: int, num_labels: int, pad_id: int = 0, labels: Sequence[str] = ()
) -> "PreTrainedConfig":
    """The config of the student that `entry` describes. `labels` are names of its outputs, in order.

    Raises ConfigError for a model_type or a key that transformers does not know, with the nearest one.
    """
    from transformers import CONFIG_MAPPING, AutoConfig
    from transformers.models.auto import modeling_auto

    known = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    if entry.model_type not in known:
        raise ConfigError(
            f"students of kind transformers: transformers has no classifier of rows with model_type "
            f"{entry.model_type!r}{did_you_mean(entry.model_type, sorted(known))}"
        )
    kind = CONFIG_MAPPING[entry.model_type]
    other_names: Mapping[str, str] = kind.attribute_map
    keys = {*kind().to_dict(), *other_names}
    for key in entry.config:
        if key not in keys:
            raise ConfigError(
                f"students of kind transformers: {entry.model_type} has no config key {key!r}"
                f"{did_you_mean(key, sorted(keys))}"
            )
    own: dict[str, Any] = dict(entry.config)
    if POSITIONS_KEY in keys and not {POSITIONS_KEY, other_names.get(POSITIONS_KEY)} & set(own):
        own[POSITIONS_KEY] = max(entry.max_length, 16) + SPARE_POSITIONS
    names = list(labels) or [f"LABEL_{i}" for i in range(num_labels)]
    own |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    try:
        made = AutoConfig.for_model(entry.model_type, **own, vocab_size=num_ids, pad_token_id=pad_id)
    except Exception as error:  # each config has checks, and errors, of its own
        raise ConfigError(
            f"students of kind transformers: {entry.model_type} refuses {own}: {error}"
        ) from error
    if made.is_encoder_decoder:
        raise ConfigError(
            f"students of kind transformers: {entry.model_type} reads a text and writes another; take an "
            "encoder (distilbert, electra, ...) or a decoder (gpt2, llama, ...)."
        )
    return made


def build_network(made: "PreTrainedConfig") -> "nn.Module":
    """The classifier of this config, with random weights. Raises ConfigError where its sizes do not fit."""
    from transformers import AutoModelForSequenceClassification

    try:
        net: nn.Module = AutoModelForSequenceClassification.from_config(made)
    except Exception as error:  # each architecture has checks, and errors, of its own
        raise ConfigError(
            f"students of kind transformers: a {made.model_type} of this config cannot be built: {error}\n"
            f"Fix its `config`, or leave out keys that can have transformers' defaults."
        ) from error
    return net


def check_padding(model: "nn.Module", entry: TransformersStudent, num_ids: int) -> None:
    """Raise ConfigError where `model` cannot read rows of max_length, or where padding changes its logits."""
    import torch

    ids = torch.arange(2 * entry.max_length).reshape(2, -1) % num_ids
    mask = torch.arange(entry.max_length) < torch.tensor([[entry.max_length], [-(-entry.max_length // 2)]])
    short = mask[1]
    model.eval()
    try:
        with torch.inference_mode():
            together = model(input_ids=ids, attention_mask=mask)
            alone = model(input_ids=ids[1:, short], attention_mask=mask[1:, short])
    except (IndexError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"students of kind transformers: the {entry.model_type} cannot read {entry.max_length} tokens: "
            f"{error}\nLower max_length, or raise the positions under `config`."
        ) from error
    if not torch.allclose(together[1], alone[0], atol=TOLERANCE, rtol=TOLERANCE):
        raise ConfigError(
            f"students of kind transformers: the logits of a {entry.model_type} depend on the padding of a "
            "row, and so on the other rows of its batch.\nChoose another model_type."
        )
