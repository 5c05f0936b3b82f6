"""What each task has that others have not: its loader, losses and students."""

from storage.tasks import Task

# Which caches each kind of student is trained on.
TEXT_ROWS: tuple[Task, ...] = (
    "sequence-classification", "multi-label-classification", "regression", "sentence-embedding"
)  # fmt: skip
STUDENT_TASKS: dict[str, tuple[Task, ...]] = {
    "fc": TEXT_ROWS, "bilstm": TEXT_ROWS, "tinybert": TEXT_ROWS, "llama": ("causal-lm",),
    "transformers": ("sequence-classification",), "mlp": ("image-classification",),
}  # fmt: skip
# The divergences of tasks that have not those of one class; the first is what a refusal advises.
DIVERGENCES: dict[Task, tuple[str, ...]] = {
    "multi-label-classification": ("forward",), "regression": ("mse",),
    "sentence-embedding": ("cosine", "mse"),
}  # fmt: skip
CLASS_DIVERGENCES = ("forward", "reverse", "jsd", "skewed")

# How transformers calls what a head is trained for.
PROBLEM_TYPES = {"multi-label-classification": "multi_label_classification", "regression": "regression"}
# How transformers calls the models of each task.
AUTO_CLASSES = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "multi-label-classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "sentence-embedding": "AutoModel",
}
