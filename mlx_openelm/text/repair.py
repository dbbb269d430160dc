"""Repair of texts with ftfy, as CoreNet repairs them before they are tokenized."""

import ftfy


def repair(text: str) -> str:
    """Return the text after ftfy's default fixes, in Unicode's form NFC."""
    return ftfy.fix_text(text, normalization="NFC")
