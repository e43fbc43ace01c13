"""SipHash-2-4 (Aumasson and Bernstein 2012), vectorised over many messages.

A published keyed PRF with a 128-bit key and a 64-bit result. Messages are either rows of 64-bit words or
UTF-8 texts; both give what the reference gives for the same bytes. Work is cut in blocks small enough for
the processor's cache, which is where the speed comes from.

Shape suffixes: N messages, W words of a message, B messages of a block.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Words = NDArray[np.uint64]

BLOCK = 32768
"""Messages hashed at a time: long enough to hide the cost of a numpy call, and the five arrays of a block
stay within a second-level cache."""
_INITIAL = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
_FINAL = np.uint64(0xFF)


def siphash_words(key16: bytes, words_NW: Words) -> Words:
    """Hash each row of 64-bit words, as the little-endian bytes of the row.

    Args:
        key16: 16 bytes.
        words_NW: Messages of W words each, (N, W) uint64.

    Returns:
        (N,) uint64.

    Raises:
        ValueError: The key isn't 16 bytes long, or the words aren't a matrix.
    """
    if words_NW.ndim != 2:
        raise ValueError(f"expected words of shape (N, W), got {words_NW.shape}")
    count, width = words_NW.shape
    last = np.uint64((8 * width & 0xFF) << 56)
    hashes_N = np.empty(count, np.uint64)
    for start in range(0, count, BLOCK):
        words_BW = words_NW[start : start + BLOCK].astype(np.uint64, copy=False)
        state = _State(key16, len(words_BW))
        for column in range(width):
            state.absorb(np.ascontiguousarray(words_BW[:, column]))
        state.absorb(np.full(len(words_BW), last))
        hashes_N[start : start + BLOCK] = state.finish()
    return hashes_N


def siphash_text(key16: bytes, texts: pa.StringArray) -> Words:
    """Hash the UTF-8 bytes of each text.

    Args:
        key16: 16 bytes.
        texts: N texts without nulls.

    Returns:
        (N,) uint64.

    Raises:
        ValueError: A text is null, or the key isn't 16 bytes long.
    """
    if texts.null_count:
        raise ValueError("expected texts without nulls")
    count = len(texts)
    hashes_N = np.empty(count, np.uint64)
    if count == 0:
        return hashes_N
    _, offsets_buffer, data_buffer = texts.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32, count + 1, offset=4 * texts.offset)
    data = np.frombuffer(data_buffer, np.uint8) if data_buffer is not None else np.empty(0, np.uint8)
    for start in range(0, count, BLOCK):
        ends = offsets[start : start + BLOCK + 1]
        order, words = _cut(data[ends[0] : ends[-1]], (ends[:-1] - ends[0]).astype(np.int64), np.diff(ends))
        state = _State(key16, len(ends) - 1)
        for word in words:
            state.absorb(word)
        if order is None:
            hashes_N[start : start + BLOCK] = state.finish()
        else:
            hashes_N[start : start + BLOCK][order] = state.finish()
    return hashes_N


def _cut(
    data: NDArray[np.uint8], starts_B: NDArray[np.int64], lengths_B: NDArray[np.int32]
) -> tuple[NDArray[np.int64] | None, list[Words]]:
    """Cut texts into the words that SipHash absorbs, longest text first.

    Returns:
        The order in which the texts stand (None: as they came) and, for the first, second, ... word, the
        words of the texts that have one. With the longest first these are a prefix each time.
    """
    counts_B = (lengths_B >> 3) + 1
    longest = int(counts_B.max())
    order = None
    if int(counts_B.min()) != longest:
        order = np.argsort(-counts_B, kind="stable")
        starts_B, lengths_B, counts_B = starts_B[order], lengths_B[order], counts_B[order]
    padded = np.zeros(len(data) + 16, np.uint8)
    padded[: len(data)] = data
    # Every position of the bytes, read as a 64-bit word: an unaligned window instead of eight gathers.
    windows = np.lib.stride_tricks.as_strided(padded[:8].view("<u8"), (len(data) + 9,), (1,), writeable=False)
    kept = (1 << np.arange(0, 64, 8, dtype=np.uint64)) - np.uint64(1)
    words = []
    for index in range(longest):
        active = len(counts_B) if order is None else int(np.searchsorted(-counts_B, -index, side="left"))
        word = windows[starts_B[:active] + 8 * index]
        ending = slice(0, active) if order is None else slice(int(np.searchsorted(-counts_B, -index - 1)), active)
        if order is not None or index == longest - 1:
            lengths = lengths_B[ending]
            word[ending] &= kept[lengths & 7]
            word[ending] |= lengths.astype(np.uint64) << np.uint64(56)
        words.append(word)
    return order, words


class _State:
    """The four words of SipHash's state, for the messages of one block."""

    def __init__(self, key16: bytes, count: int) -> None:
        if len(key16) != 16:
            raise ValueError(f"expected a key of 16 bytes, got {len(key16)}")
        halves = np.frombuffer(key16, "<u8")
        self._v = [np.full(count, np.uint64(value) ^ halves[i % 2]) for i, value in enumerate(_INITIAL)]
        self._scratch = np.empty(count, np.uint64)

    def absorb(self, word: Words) -> None:
        """Take in one word of the first ``len(word)`` messages."""
        v = [part[: len(word)] for part in self._v]
        v[3] ^= word
        self._round(v)
        self._round(v)
        v[0] ^= word

    def finish(self) -> Words:
        """Return the hashes."""
        v = self._v
        v[2] ^= _FINAL
        for _ in range(4):
            self._round(v)
        hashes: Words = v[0] ^ v[1] ^ v[2] ^ v[3]
        return hashes

    def _round(self, v: list[Words]) -> None:
        a, b, c, d = v
        scratch = self._scratch[: len(a)]
        np.add(a, b, a)
        _rotate(b, 13, scratch)
        np.bitwise_xor(b, a, b)
        _rotate(a, 32, scratch)
        np.add(c, d, c)
        _rotate(d, 16, scratch)
        np.bitwise_xor(d, c, d)
        np.add(a, d, a)
        _rotate(d, 21, scratch)
        np.bitwise_xor(d, a, d)
        np.add(c, b, c)
        _rotate(b, 17, scratch)
        np.bitwise_xor(b, c, b)
        _rotate(c, 32, scratch)


_SHIFTS = {bits: (np.uint64(bits), np.uint64(64 - bits)) for bits in (13, 16, 17, 21, 32)}


def _rotate(words: Words, bits: int, scratch: Words) -> None:
    left, right = _SHIFTS[bits]
    np.right_shift(words, right, scratch)
    np.left_shift(words, left, words)
    np.bitwise_or(words, scratch, words)
