"""A toy GPT-2 classifier: no [SEP], no [CLS], no padding token of its own, padding on the left."""

import json
from pathlib import Path

from pipeline.teachers.record import RECORD
from tests import toy

EOS = "<|endoftext|>"


def write(directory: Path) -> None:
    """A decoder of two layers with random weights and a byte-level BPE tokenizer, as it would be saved."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    directory.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # As in GPT-2 itself, id 0 is a letter of texts ("!"), and the end of text is the last id.
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(toy.texts(50), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, padding_side="left")
    fast.save_pretrained(directory)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(fast), n_positions=64, n_embd=16, n_layer=2, n_head=2, num_labels=2,
        bos_token_id=fast.eos_token_id, eos_token_id=fast.eos_token_id,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    model.score.weight.data.normal_()
    model.save_pretrained(directory)
    record = {"task": "sequence-classification", "labels": ["negative", "positive"]}
    record |= {"max_length": 64, "too_long": "error"}
    (directory / RECORD).write_text(json.dumps(record))
