"""A set of names that costs 8 bytes per name.

Each name is kept as a 64-bit BLAKE2b hash: one sorted array, and the latest in a Python set that
is merged into it when it is full. Two of n names share a hash with probability n^2 / 2^65, which
is 3e-8 for 10^6 names.
"""

import os
from hashlib import blake2b

import numpy as np

NUM_RECENT = 1 << 16


class Fingerprints:
    """Names, by their hashes; file names that are no UTF-8 are welcome."""

    def __init__(self) -> None:
        self._sorted = np.empty(0, np.uint64)
        self._recent: set[int] = set()

    def __contains__(self, name: str) -> bool:
        return self._holds(_fingerprint(name))

    def add(self, name: str) -> bool:
        """Adds a name and tells whether it is new."""
        fingerprint = _fingerprint(name)
        if self._holds(fingerprint):
            return False
        self._recent.add(fingerprint)
        if len(self._recent) >= NUM_RECENT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.concatenate([self._sorted, recent])
            self._sorted.sort()
            self._recent = set()
        return True

    def _holds(self, fingerprint: int) -> bool:
        if fingerprint in self._recent:
            return True
        position = int(np.searchsorted(self._sorted, np.uint64(fingerprint)))
        return position < len(self._sorted) and int(self._sorted[position]) == fingerprint


def _fingerprint(name: str) -> int:
    return int.from_bytes(blake2b(os.fsencode(name), digest_size=8).digest(), "little")
