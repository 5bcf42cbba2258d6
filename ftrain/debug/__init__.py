"""Where numbers went wrong: the first value that is not finite, and the pass that changed a bit."""

from ftrain.debug.finite import Finding, Range, check_finite
from ftrain.debug.pass_check import PassCheck, check_passes

__all__ = ["Finding", "PassCheck", "Range", "check_finite", "check_passes"]
