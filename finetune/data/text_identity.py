"""When two texts count as the same, and what stands for a text: its digest. No rows, no files."""

from __future__ import annotations

import unicodedata
from hashlib import blake2b


def normalise(text: str) -> str:
    """NFKC, case folded, whitespace collapsed: texts equal under it count as the same text."""
    return " ".join(fold(text).split())


def fold(text: str) -> str:
    """`normalise` without touching whitespace."""
    if text.isascii():
        return text.lower()  # the same, ten times as fast
    # Folding can undo the composed form (and composing can bring back a case), hence NFKC on both sides.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


def text_digest(text: str) -> bytes:
    """16 bytes that stand for the normalised text, the same on every machine and in every version."""
    return blake2b(normalise(text).encode("utf-8", "surrogatepass"), digest_size=16).digest()


def fraction(digest: bytes, seed: int) -> float:
    """A number in [0, 1) that depends on the digest and `seed` only."""
    salt = (seed % 2**64).to_bytes(8, "little")
    number = int.from_bytes(blake2b(digest, digest_size=8, salt=salt).digest(), "little")
    return (number >> 11) / 2**53  # 53 bits are what a float holds exactly; more could round up to 1.0
