"""Files of rows with random access: a row is a mapping of fields, with the place where it stands."""

from ftrain.lazy import lazy_modules as _lazy_modules

# Modules whose packages a base install has not: each is loaded when a file of its kind is opened.
__all__ = ["arrow", "parquet", "remote"]
__getattr__ = _lazy_modules(__name__, __all__)
