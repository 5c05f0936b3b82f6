"""Documents -> blocks of a limited number of words: rows of a size that a language model can read.

A word is text between white space, and is never cut. Blocks have the documents' text as it is, including the
white space between words; only the white space between two blocks is left out.
"""

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from pipeline.config.datasets import Blocks

WORD = re.compile(r"\S+")
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+")
GOOD_END = re.compile(rf"{SENTENCE_END.pattern}|\n")


class _Word(NamedTuple):
    before: str  # the text between the previous word and this one
    text: str
    opens: bool  # whether a document starts here


def chunk_documents(documents: Iterable[tuple[str, str]], blocks: Blocks) -> Iterator[tuple[str, str]]:
    """(split, text) of every block, from (split, text) of every document, without white space at its ends.

    Full blocks come first, in order, and unfinished ones last: more documents at the end change only the
    unfinished ones.
    """
    open_ones: dict[str, _OpenChunk] = {}
    for split, document in documents:
        block = open_ones.setdefault(split, _OpenChunk(blocks))
        for text in block.filled(document):
            yield split, text
        if not blocks.across_documents:
            yield split, block.take()
    if blocks.across_documents:
        for split, block in open_ones.items():
            yield split, block.take()


class _OpenChunk:
    """The words that are not in a finished block yet; at least one after the first document."""

    def __init__(self, blocks: Blocks) -> None:
        self._most, self._separator = blocks.words, blocks.separator
        self._words: list[_Word] = []

    def filled(self, document: str) -> Iterator[str]:
        """The texts of the blocks that this document fills."""
        end = 0
        for word in WORD.finditer(document):
            opens = word.start() == 0
            before = self._separator if opens else document[end : word.start()]
            self._words.append(_Word(before, word.group(), opens))
            end = word.end()
            if len(self._words) > self._most:
                yield self.take(self._good_end())

    def take(self, words: int | None = None) -> str:
        """The text of the first words, or of all, which are removed."""
        taken = self._words[:words]
        del self._words[:words]
        return taken[0].text + "".join(word.before + word.text for word in taken[1:])

    def _good_end(self) -> int:
        for end in range(self._most, self._most - self._most // 4, -1):
            last, following = self._words[end - 1 : end + 1]
            if following.opens or GOOD_END.search(last.text + following.before):
                return end
        return self._most
