"""Chunk sizes that limit the memory of logits and attention scores."""

LOGIT_ROWS = 512  # positions per chunk of logits: 65 MB at 32000 pieces
QUERIES = 256  # queries per chunk of attention scores on the CPU
SCORES_AT_ONCE = 2**26  # attention scores that training on a GPU computes at a time


def training_logit_rows(vocab_size: int) -> int:
    """Return the positions per chunk of logits in training: about 16 MB."""
    return max(LOGIT_ROWS * 8000 // vocab_size, 64)


def fused_logit_rows(vocab_size: int) -> int:
    """Return the positions per chunk of logits in training on a GPU."""
    return max(2**25 // vocab_size, 1024)
