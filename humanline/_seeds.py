"""Where every stream of random numbers gets its seed."""

from hashlib import blake2b


def stream_seed(purpose: str, *parts: int) -> int:
    """The seed of one stream of random numbers.

    Streams of another purpose, run, step, rank or place have unrelated seeds. Sums such as ``seed + epoch`` do not: the
    second epoch of seed 1 would be the first of seed 2.

    Args:
        purpose (str): what the numbers are for; no two places of the code share one.
        parts (int): what tells the streams of that purpose apart: the user's seed first, then step, rank and so on.

    Returns:
        int: at least 0 and below ``2**63``.
    """
    digest = blake2b(" ".join([purpose, *map(str, parts)]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
