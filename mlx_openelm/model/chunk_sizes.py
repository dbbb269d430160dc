"""How much of a large intermediate result exists at a time."""

LOGIT_ROWS = 512  # positions whose logits exist at a time: 65 MB for 32000 pieces
QUERIES = 256  # queries whose attention scores exist at a time on the CPU


def training_logit_rows(vocab_size: int) -> int:
    """Return how many positions' logits exist at a time in training: about 16 MB."""
    return max(LOGIT_ROWS * 8000 // vocab_size, 64)
