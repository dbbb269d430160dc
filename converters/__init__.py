"""Foreign files in, PyTorch reference training, proof of equality."""
