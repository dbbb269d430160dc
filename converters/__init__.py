"""Conversion between model formats, and pre-training in PyTorch."""
