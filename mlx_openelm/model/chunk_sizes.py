"""Chunk sizes that limit the memory of logits and attention scores."""

LOGIT_ROWS = 512  # positions per chunk of logits: 65 MB at 32000 pieces
QUERIES = 256  # queries per chunk of attention scores on the CPU


def training_logit_rows(vocab_size: int) -> int:
    """Return the positions per chunk of logits in training: about 16 MB."""
    return max(LOGIT_ROWS * 8000 // vocab_size, 64)
