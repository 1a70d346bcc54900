"""Adapters for other libraries, a file for each, imported only when asked for."""
