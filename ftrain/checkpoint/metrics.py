"""The metrics of a step, which its manifest keeps: numbers by name."""

from collections.abc import Mapping


def checked_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics as floats by name; none where `metrics` is None.

    Args:
        metrics: numbers, or what `float` takes as one (a tensor of one element); NaN and infinities too.

    Raises:
        ValueError: a name is no text, or cannot be written as UTF-8; a value is no number. It is named.
    """
    found: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str):
            raise ValueError(f"the metric {name!r} has no text for a name: name it as 'loss'")
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise ValueError(f"the metric {name!a} has a name that is not UTF-8: rename it")
        try:
            found[name] = float(value) if not isinstance(value, str) else float("-")
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"the metric {name!r} is {value!r}, not a number: give one number, as loss.item()"
            ) from None
    return found
