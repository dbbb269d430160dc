"""Apple's published speeds on a Mac: Mehta et al., arXiv 2404.14619, table 7.

UNVERIFIED: quoted from memory. The totals agree with the other values and 36 prompt
tokens to rounding, except for the 270M in 4 bits. They are comparable only with
`apple_protocol`.
"""

from dataclasses import dataclass

SETTING = "M2 Max, MLX 0.10, 36 prompt tokens and 1024 new tokens"


@dataclass(frozen=True, slots=True)
class PublishedSpeed:
    """Tokens per second; 16 bits are float16, or bfloat16 for the 3B."""

    size: str
    bits: int
    prompt_tps: float
    generation_tps: float
    total_tps: float
    setting: str = SETTING
    verified: bool = False


PUBLISHED = (
    PublishedSpeed("270M", 16, 1151.41, 212.40, 218.45),
    PublishedSpeed("270M", 4, 803.99, 256.35, 262.70),
    PublishedSpeed("450M", 16, 910.61, 147.26, 151.57),
    PublishedSpeed("450M", 4, 883.19, 197.81, 203.16),
    PublishedSpeed("1.1B", 16, 508.56, 78.72, 81.04),
    PublishedSpeed("1.1B", 4, 554.17, 117.90, 121.14),
    PublishedSpeed("3B", 16, 234.96, 33.96, 34.97),
    PublishedSpeed("3B", 4, 211.32, 60.33, 61.83),
)


def find_published(size_name: str, bits: int) -> PublishedSpeed | None:
    """Return the published speed of a size ("OpenELM-1_1B") in these bits, or None."""
    size = size_name.removeprefix("OpenELM-").replace("_", ".")
    return next((p for p in PUBLISHED if (p.size, p.bits) == (size, bits)), None)
