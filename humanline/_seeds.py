"""Derives the seed of every stream of random numbers."""

from hashlib import blake2b


def stream_seed(purpose: str, *parts: int) -> int:
    """Returns the seed of one stream of random numbers.

    Streams that differ in purpose, run, step, rank or place have unrelated seeds. A sum such as ``seed + epoch`` would
    not do: the second epoch of seed 1 would equal the first epoch of seed 2.

    Args:
        purpose (str): the use of the numbers. Every use in the code has its own name.
        parts (int): the numbers that separate the streams of one purpose: the user's seed, then step, rank and so on.

    Returns:
        int: the seed, at least 0 and below ``2**63``.
    """
    digest = blake2b(" ".join([purpose, *map(str, parts)]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
