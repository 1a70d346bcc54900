"""Drop-in modules, thin over `fastssl.functional`."""
__all__ = []
