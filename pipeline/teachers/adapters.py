"""LoRA adapters: low-rank updates of some linear layers are trained, then merged into the weights.

LoRA (Hu et al. 2021): a layer computes x W^T + (alpha / rank) x A^T B^T; W is frozen, A and B are trained,
and so is the head. B starts at 0, so training starts from the model itself. Merged, the weights are
W + (alpha / rank) B A: an ordinary model for everything after the teacher stage.
"""

import warnings
from typing import TYPE_CHECKING

import torch

from pipeline.config.base import did_you_mean
from pipeline.config.teachers import Lora
from storage.errors import TeacherError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


def with_adapters(name: str, model: "PreTrainedModel", lora: Lora) -> "PeftModel":
    """`model` with adapters. They are trained, and the modules outside its base model (the head).

    Raises TeacherError where `targets` are not linear layers of the model, with the names that it has.
    """
    from peft import LoraConfig, get_peft_model
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    base = getattr(model, model.base_model_prefix)
    parts = {path.rpartition(".")[2] for path, m in base.named_modules() if isinstance(m, torch.nn.Linear)}
    default = DEFAULTS.get(model.config.model_type)
    targets = default if lora.targets == "auto" else list(lora.targets)
    if targets is None:
        raise TeacherError(
            f"teachers.{name}.train.lora.targets: peft has no default for a {model.config.model_type}.\n"
            f"Name some of its linear layers: {', '.join(sorted(parts))}."
        )
    if unknown := [target for target in targets if target not in parts]:
        raise TeacherError(
            f"teachers.{name}.train.lora.targets: the model has no linear layer {unknown[0]!r}"
            f"{did_you_mean(unknown[0], sorted(parts))}."
        )
    paths = [path for path, module in model.named_modules() if module is base]
    wanted = [
        f"{paths[0]}.{path}"
        for path, module in base.named_modules()
        if isinstance(module, torch.nn.Linear) and path.rpartition(".")[2] in targets
    ]
    settings = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=wanted
    )
    with warnings.catch_warnings():  # peft uses a deprecated name of transformers
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        made = get_peft_model(model, settings)
    own = {id(parameter) for parameter in base.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(True)
    return made


def merge_adapters(model: "PeftModel") -> "PreTrainedModel":
    """The model with its adapters merged into its weights: an ordinary model with the same logits."""
    made: PreTrainedModel = model.merge_and_unload()
    return made.eval()
