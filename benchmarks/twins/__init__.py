"""Methods trained twice at once, with fastssl and with naive PyTorch: `python -m benchmarks.twins`."""
