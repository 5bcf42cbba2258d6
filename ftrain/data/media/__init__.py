"""Pictures, recordings and films as arrays: decoded within limits, in the sizes and rates that models read."""

from ftrain.lazy import lazy_modules as _lazy_modules

# Modules whose packages a base install has not: each is loaded when media of its kind are read.
__all__ = ["audio", "audio_av", "film_frames", "images"]
__getattr__ = _lazy_modules(__name__, __all__)
