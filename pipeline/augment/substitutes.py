"""Substitutes for words of a text, from a model: neighbours of its input embeddings, or its masked-word head.

Substitutes are entries of the model's vocabulary that its tokenizer reads as one token. Scores are computed
in float64 and rounded to a grid much coarser than its errors, and ties go to the smaller id, so a word has
the same substitutes on every machine and in every batch.

Shape letters: W whole words of the vocabulary, D width of an embedding, Q queried words, B texts, L tokens,
M masked places, K candidates.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.data.tokenizer import InputArrays, TextReader
from pipeline.engines.loading import input_embeddings, load_language_model
from pipeline.runtime.progress import tracked
from pipeline.streaming.model_inputs import for_transformers, input_tensors
from storage.errors import TeacherError

PARTS = re.compile(r"^(\W*)(.*?)(\W*)$", re.DOTALL)  # punctuation, word, punctuation
BEFORE_WORDS = "\u0120\u2581"  # how byte-level and sentencepiece vocabularies write the space before a word
GRID = 1e6  # steps of a score from 0 to 1
WORDS_AT_ONCE = 512
TOKENS_AT_ONCE = 2048  # each takes a float64 for every id: half a GB for 30,000 ids
MAX_LENGTH = 512  # tokens of a text; fewer where the model has fewer positions


class Request(NamedTuple):
    """Words of a text, and the places of those to replace, in order."""

    words: list[str]
    places: Sequence[int]


class Substitutes(Protocol):
    """Finds substitutes for words of texts."""

    def __call__(self, requests: Sequence[Request]) -> list[list[list[str]]]:
        """For each request and each of its places the candidates, best first; empty for none."""
        ...


class Vocabulary:
    """The W words that a tokenizer reads as one token each."""

    def __init__(self, reader: TextReader) -> None:
        self.tokenizer = reader.tokenizer
        special = set(reader.special.values())
        known = sorted(self.tokenizer.get_vocab(with_added_tokens=False).items(), key=lambda entry: entry[1])
        named = [(token.lstrip(BEFORE_WORDS), i) for token, i in known if i not in special]
        named = [(word, i) for word, i in named if word.isalpha()]
        alone, inside = (
            self.tokenizer.encode_batch_fast([f"{b}{w}" for w, _ in named], add_special_tokens=False)
            for b in ("", " ")
        )
        whole = [
            (word, i)
            for (word, i), first, second in zip(named, alone, inside, strict=True)
            if [i] in (first.ids, second.ids)
        ]
        self.words = [word for word, _ in whole]
        self.ids = np.array([i for _, i in whole], np.int64)  # W, ascending
        self._number = {f: n for n, f in enumerate(dict.fromkeys(word.casefold() for word in self.words))}
        self._folded = np.array([self._number[word.casefold()] for word in self.words], np.int64)  # W
        self._place = {word: place for place, word in enumerate(self.words)}

    def place(self, word: str) -> int | None:
        """The index of a word of a text, as this tokenizer normalises it; None for other words."""
        normalizer = self.tokenizer.normalizer
        return self._place.get(normalizer.normalize_str(word) if normalizer else word)

    def same(self, word: str) -> npt.NDArray[np.bool_]:
        """Which of the W words are this word, in any case [W]."""
        found: npt.NDArray[np.bool_] = self._folded == self._number.get(word.casefold(), -1)
        return found


class Neighbours:
    """The words whose input embeddings have the largest cosine with a word's own."""

    def __init__(self, model: Path, num_candidates: int) -> None:
        self._vocabulary = Vocabulary(TextReader(model, MAX_LENGTH, "truncate"))
        embeddings_VD = input_embeddings(model).double().numpy()
        own_WD = embeddings_VD[self._vocabulary.ids]
        self._unit_WD = own_WD / np.maximum(np.linalg.norm(own_WD, axis=1, keepdims=True), 1e-30)
        self._num = num_candidates
        self._known: dict[int, list[str]] = {}

    def __call__(self, requests: Sequence[Request]) -> list[list[list[str]]]:
        """See Substitutes. Words outside the vocabulary have no neighbours."""
        places = [[self._vocabulary.place(core(r.words[p])) for p in r.places] for r in requests]
        self._look_up(sorted({p for row in places for p in row if p is not None} - set(self._known)))
        return [[[] if p is None else self._known[p] for p in row] for row in places]

    def _look_up(self, words: list[int]) -> None:
        for start in tracked("neighbours of words", range(0, len(words), WORDS_AT_ONCE), "batches"):
            part = words[start : start + WORDS_AT_ONCE]
            cosine_QW = self._unit_WD[part] @ self._unit_WD.T
            for word, scores_W in zip(part, cosine_QW, strict=True):
                same = self._vocabulary.same(self._vocabulary.words[word])
                best = best_first(scores_W, same, self._num)
                self._known[word] = [self._vocabulary.words[place] for place in best]


class Masked:
    """The words that a masked language model predicts for masked words; all places are masked at once."""

    def __init__(self, model: Path, num_candidates: int) -> None:
        self._reader = TextReader(model, MAX_LENGTH, "truncate")
        try:
            self._model = load_language_model(model, "float64", "AutoModelForMaskedLM")
        except TeacherError as error:
            raise TeacherError(f"{error}\nOr write words: embeddings, which needs no such head.") from error
        if "mask_token" not in self._reader.special:
            raise TeacherError(f"the tokenizer in {model} has no mask token.\nWrite words: embeddings.")
        positions = getattr(self._model.config, "max_position_embeddings", MAX_LENGTH)
        self._reader.max_length = min(MAX_LENGTH, positions)
        self._mask_id = self._reader.special["mask_token"]
        self._mask = str(self._reader.tokenizer.id_to_token(self._mask_id))
        self._vocabulary = Vocabulary(self._reader)
        self._num = num_candidates

    def __call__(self, requests: Sequence[Request]) -> list[list[list[str]]]:
        """See Substitutes. Any word can be masked."""
        texts = [self._masked(request) for request in requests]
        tokens = self._reader.read(texts, [""] * len(texts))
        found: list[list[list[str]]] = [[] for _ in requests]
        for part in tracked("words for masks", _batches(tokens.lengths), "batches"):
            inputs = tokens.padded(part, self._reader.pad_id)
            for row, scores_MW in zip(part, self._scores(inputs), strict=True):
                # Places beyond the maximum length have no scores, and keep their words.
                request = requests[row]
                found[row] = [
                    self._candidates(core(request.words[place]), scores_W)
                    for place, scores_W in zip(request.places, scores_MW, strict=False)
                ]
                found[row] += [[] for _ in request.places[len(scores_MW) :]]
        return found

    def _masked(self, request: Request) -> str:
        words = [word.replace(self._mask, "") for word in request.words]
        for place in request.places:
            words[place] = with_core(words[place], self._mask)
        return " ".join(words)

    def _scores(self, arrays: InputArrays) -> list[npt.NDArray[np.float64]]:
        """Log-probabilities of the W words at the masked places of each row: [M, W]."""
        inputs = input_tensors(arrays, self._model.device)
        with torch.inference_mode():
            logits_BLV = self._model(**for_transformers(inputs)).logits
            masked = (inputs["input_ids"] == self._mask_id) & inputs["attention_mask"]
            log_probs = logits_BLV[masked].double().log_softmax(-1)
            scores = log_probs[:, torch.from_numpy(self._vocabulary.ids)]
        return np.split(scores.cpu().numpy(), np.cumsum(masked.sum(1).cpu().numpy())[:-1])

    def _candidates(self, word: str, scores_W: npt.NDArray[np.float64]) -> list[str]:
        best = best_first(scores_W, self._vocabulary.same(word), self._num)
        return [self._vocabulary.words[place] for place in best]


def best_first(
    scores_W: npt.NDArray[np.float64], left_out: npt.NDArray[np.bool_], num: int
) -> npt.NDArray[np.int64]:
    """The places of the `num` largest scores, rounded to the grid; ties in the order of places."""
    steps = np.round(scores_W * GRID).astype(np.int64)
    order = -steps * len(steps) + np.arange(len(steps))  # one number for both, so that no two are equal
    order = order[~left_out]
    kept = np.flatnonzero(~left_out)
    if num < len(order):
        chosen = np.argpartition(order, num)[:num]
        order, kept = order[chosen], kept[chosen]
    best: npt.NDArray[np.int64] = kept[np.argsort(order)]
    return best


def _batches(lengths: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """Batches of rows of similar length, the longest first, of at most TOKENS_AT_ONCE padded tokens."""
    longest_first = np.argsort(-lengths, kind="stable")
    parts, start = [], 0
    while start < len(lengths):
        num = max(1, TOKENS_AT_ONCE // int(lengths[longest_first[start]]))
        parts.append(longest_first[start : start + num])
        start += num
    return parts


def core(word: str) -> str:
    """A word without its punctuation."""
    return _parts(word)[1]


def with_core(word: str, other: str) -> str:
    """Another word in the punctuation of this one."""
    before, _, after = _parts(word)
    return before + other + after


def _parts(word: str) -> tuple[str, str, str]:
    found = PARTS.match(word)
    assert found is not None  # every part of the pattern may be empty
    return found.group(1), found.group(2), found.group(3)
