"""Kernels and launchers that several families share."""
