"""Brings a machine with a GPU up: what is there, whether it is right, how fast it is, and why."""
