"""Text that a language model generates, for people: continuations of the first documents of a dataset."""

from collections.abc import Callable, Sequence

import torch

from pipeline.data.rows import Rows
from pipeline.data.tokenizer import TextReader

SAMPLING_TEMPERATURE = 0.8
SAMPLED_FROM = 40  # of the most likely tokens
NUM_LINES, PROMPT_TOKENS, LINE_TOKENS = 3, 12, 24

NextLogits = Callable[[torch.Tensor], torch.Tensor]  # ids [1, L] -> logits [V] of the next token
Line = dict[str, str]


def sampled_lines(next_logits: NextLogits, rows: Rows, reader: TextReader) -> list[Line]:
    """Continuations of the beginnings of the first documents; every model gets the same ones and the same
    random numbers.
    """
    first = reader.tokenizer.encode_batch_fast(rows.texts.slice(0, NUM_LINES).to_pylist())
    prompts = [encoding.ids[:PROMPT_TOKENS] for encoding in first]
    continuations = continue_prompts(next_logits, prompts, LINE_TOKENS, seed=0)
    decode = reader.tokenizer.decode
    return [
        {"begins": decode(prompt), "goes_on": decode(ids)}
        for prompt, ids in zip(prompts, continuations, strict=True)
    ]


@torch.inference_mode()
def continue_prompts(
    next_logits: NextLogits, prompts: Sequence[Sequence[int]], num_tokens: int, seed: int
) -> list[list[int]]:
    """The ids of `num_tokens` more tokens for each prompt, sampled; the same seed gives the same draws.

    Runs the model on the whole line for each token, without a cache of keys and values: for short lines.
    """
    lines = [list(prompt) for prompt in prompts]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        for line in lines:
            logits = next_logits(torch.tensor([line])).float().cpu()
            top = (logits / SAMPLING_TEMPERATURE).topk(min(SAMPLED_FROM, len(logits)))
            drawn = torch.multinomial(top.values.softmax(-1), 1, generator=generator)
            line.append(int(top.indices[drawn]))
    return [line[len(prompt) :] for line, prompt in zip(lines, prompts, strict=True)]
