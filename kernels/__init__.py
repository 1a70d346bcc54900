"""Triton kernels and their launchers, one module per family. Installed as `fastssl.kernels`."""
