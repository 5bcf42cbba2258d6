"""Rotary positions in a `config.json`: as transformers 4 spells them, as 5 does, and as both when both are there.

Version 4 has `rope_theta` and `rope_scaling` side by side, version 5 one `rope_parameters`, which may be nested: one
entry for each type of layer. Whoever moves a file from one to the other may leave both, so all are read.
"""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from ftrain.kernels.rope import Llama3Scaling
from ftrain.modules.hf_fields import Config, number, size

READ = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_FIELDS = {"default": (), "llama3": _LLAMA3}


def rope_of(config: Config, *, default_base: float) -> tuple[float, Llama3Scaling | None]:
    """The base of the frequencies, and how they are stretched for long texts.

    ValueError where two entries contradict each other, where types of layers differ, or where positions are of a type
    that is not here; it names the entries.
    """
    found = _joined(_parts(config))
    kind = found.pop("rope_type", ("", "default"))[1]
    if kind not in _FIELDS or found.get("partial_rotary_factor", ("", 1.0))[1] != 1.0:
        said = {name: value for name, (_, value) in found.items()}
        raise ValueError(
            f"config.json: rotary positions of type {kind!r} ({said}); ours are of type 'default' or 'llama3', of all "
            "of a head (partial_rotary_factor 1)"
        )
    for name, (where, value) in found.items():
        if name not in (*_FIELDS[kind], "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            raise ValueError(f"config.json: {where}={value!r} says nothing to rotary positions of type {kind!r}")
    values = {name: value for name, (_, value) in found.items()}
    base = number(values, "rope_theta", default_base)
    if kind == "default":
        return base, None
    missing = [field for field in _LLAMA3 if field not in values]
    if missing:
        raise ValueError(f"config.json: rotary positions of type 'llama3' need {missing[0]} ({values})")
    factor, low, high = (number(values, field, 0.0) for field in _LLAMA3[:3])
    return base, Llama3Scaling(factor, low, high, size(values, _LLAMA3[3]))


def rope_fields(base: float, scaling: Llama3Scaling | None) -> dict[str, Any]:
    """Both spellings of it, for a file that is written."""
    said = {"rope_type": "default"}
    if scaling is not None:
        said = {"rope_type": "llama3", **dict(zip(_LLAMA3, astuple(scaling), strict=True))}
    fields: dict[str, Any] = {"rope_theta": base, "rope_parameters": {"rope_theta": base, **said}}
    return fields if scaling is None else {**fields, "rope_scaling": said}


Part = tuple[str, Mapping[str, Any]]
"""A place in the file, and what it says."""


def _parts(config: Config) -> list[Part]:
    """Every place that says something about rotary positions."""
    top = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    parts: list[Part] = [("", top)]
    for place in ("rope_parameters", "rope_scaling"):
        said = config.get(place) or {}
        if not isinstance(said, Mapping):
            raise ValueError(f"config.json: {place}={said!r} must be an object")
        nested = {kind: part for kind, part in said.items() if isinstance(part, Mapping)}
        if nested and len(nested) < len(said):
            raise ValueError(f"config.json: {place} holds types of layers and values side by side: {dict(said)}")
        for kind, part in (nested or {"": said}).items():
            if not kind or kind in (config.get("layer_types") or [kind]):
                parts.append((f"{place}.{kind}" if kind else place, part))
    return parts


def _joined(parts: list[Part]) -> dict[str, tuple[str, Any]]:
    """What all places say together: name to the place that says it and the value."""
    found: dict[str, tuple[str, Any]] = {}
    for place, part in parts:
        for spelled, value in part.items():
            name = "rope_type" if spelled == "type" else spelled
            if value is None:
                continue
            where = f"{place}.{spelled}" if place else spelled
            before, same = found.setdefault(name, (where, value))
            if value != same:
                raise ValueError(
                    f"config.json: {before}={same!r} and {where}={value!r} contradict each other; here all layers have "
                    "the same rotary positions: leave the one that is meant"
                )
    return found
