"""The converter path: foreign files in, PyTorch reference training, proof of equality."""
