"""Whether any of many short sequences of bytes occurs in files, those inside zip archives among them."""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np

_ANCHOR_BYTES, _CHUNK_BYTES = 4, 1 << 24
_TABLE_BITS = 24


class Traces:
    """Looks for all sequences at once: by four bytes of each, then by the whole.

    Args:
        sequences: Name -> sequences; those without four different bytes in a row are left out.
    """

    def __init__(self, sequences: dict[str, Iterable[bytes]]) -> None:
        self.numbers: dict[str, int] = {}
        self._by_anchor: dict[int, list[tuple[str, int, bytes]]] = defaultdict(list)
        for name, items in sequences.items():
            kept = [(start, item) for item in set(items) if (start := _anchor(item)) is not None]
            self.numbers[name] = len(kept)
            for start, item in kept:
                anchor = int.from_bytes(item[start : start + _ANCHOR_BYTES], "little")
                self._by_anchor[anchor].append((name, start, item))
        self._anchors = np.array(sorted(self._by_anchor), np.uint32)
        self._table = np.zeros(1 << _TABLE_BITS, bool)
        self._table[self._anchors & (self._table.size - 1)] = True

    def found_in(self, content: bytes) -> dict[str, set[bytes]]:
        """Name -> its sequences that occur."""
        found: dict[str, set[bytes]] = defaultdict(set)
        for first in range(0, len(content), _CHUNK_BYTES):
            for shift in range(_ANCHOR_BYTES):
                start = first + shift
                number = min(_CHUNK_BYTES, len(content) - start) // _ANCHOR_BYTES
                if number <= 0:
                    continue
                words = np.frombuffer(content, "<u4", number, start)
                candidates = np.flatnonzero(self._table[words & np.uint32(self._table.size - 1)])
                for index in candidates[np.isin(words[candidates], self._anchors)]:
                    position = start + _ANCHOR_BYTES * int(index)
                    for name, offset, item in self._by_anchor[int(words[index])]:
                        begin = position - offset
                        if begin >= 0 and content[begin : begin + len(item)] == item:
                            found[name].add(item)
        return found

    def shares_in(self, places: Iterable[Path]) -> dict[str, float]:
        """Name -> part of its sequences that occur in any of the files, or in files below the folders."""
        found: dict[str, set[bytes]] = defaultdict(set)
        for place in places:
            for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
                if file.is_file() and not file.is_symlink():
                    for content in _contents(file.read_bytes()):
                        for name, items in self.found_in(content).items():
                            found[name] |= items
        return {name: len(found[name]) / number for name, number in self.numbers.items()}


def _anchor(item: bytes) -> int | None:
    """Where four different bytes stand in a row: what few other places have."""
    starts = range(len(item) - _ANCHOR_BYTES + 1)
    return next((start for start in starts if len(set(item[start : start + _ANCHOR_BYTES])) == _ANCHOR_BYTES), None)


def _contents(content: bytes) -> Iterator[bytes]:
    """A file's content, and what it packs."""
    yield content
    try:
        with zipfile.ZipFile(BytesIO(content)) as archive:
            for member in archive.infolist():
                yield from _contents(archive.read(member))
    except zipfile.BadZipFile:
        return
