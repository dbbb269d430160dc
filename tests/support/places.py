"""Paths of folders for tests."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
SUPPORT = Path(__file__).parent

# The project's data: stories, Apple's answers, Llama's tokenizer. May be missing.
SHARED = Path(os.environ.get("MLX_OPENELM_SHARED", ROOT.parent / "shared"))
