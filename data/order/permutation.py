"""A seeded permutation of range(N) that needs no memory: the order of an epoch.

A Feistel network over pairs (a, b) with a in range(A), b in range(B), A * B >= N, its rounds added
modulo A and B in turn, is a bijection of range(A * B) whatever its round function; walking the
cycle until the value falls below N makes it one of range(N). A = ceil(sqrt(N)) leaves less than A
values above N, so the walk almost never takes a second step.
Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
"""

import math
from functools import lru_cache
from hashlib import blake2b

NUM_ROUNDS = 8
_MASK = 2**64 - 1


def permute(position: int, size: int, seed: int, epoch: int, stream: str = "") -> int:
    """Returns the element of range(size) that pass `epoch` visits at `place`, in O(1).

    `stream` tells permutations of one run apart, such as those of its buckets.
    """
    num_rows = math.isqrt(max(size - 1, 0)) + 1
    num_columns = -(-size // num_rows)
    keys = _round_keys(seed, epoch, stream)
    while True:
        column, row = divmod(position, num_rows)
        for number, key in enumerate(keys):
            if number % 2 == 0:
                row = (row + _mix(column + key)) % num_rows
            else:
                column = (column + _mix(row + key)) % num_columns
        position = column * num_rows + row
        if position < size:
            return position


@lru_cache(maxsize=512)
def _round_keys(seed: int, epoch: int, stream: str) -> tuple[int, ...]:
    name = f"epoch order/{seed}/{epoch}{stream}"
    digest = blake2b(name.encode(), digest_size=8 * NUM_ROUNDS).digest()
    return tuple(int.from_bytes(digest[i : i + 8], "little") for i in range(0, len(digest), 8))


def _mix(value: int) -> int:
    """The finalizer of splitmix64 (Steele et al. 2014): 64 bits to 64 well-mixed bits."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
