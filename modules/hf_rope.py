"""Rotary positions in a `config.json`: as transformers 4 spells them, as 5 does, and as both when both are there.

Version 4 has `rope_theta` and `rope_scaling` side by side, version 5 one `rope_parameters`, which may be nested: one
entry for each type of layer. Whoever moves a file from one to the other may leave both, so all are read.
"""

from collections.abc import Mapping
from dataclasses import astuple
from typing import Any

from ftrain.kernels.rope import Llama3Scaling
from ftrain.kernels.yarn import YarnScaling, sharpening
from ftrain.modules.hf_fields import Config, flag, number, size

READ = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")

Scaling = Llama3Scaling | YarnScaling
"""How frequencies are stretched for long texts."""

_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = (
    "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "truncate", "attention_factor", "mscale",
    "mscale_all_dim",
)  # fmt: skip
_FIELDS = {"default": (), "llama3": _LLAMA3, "yarn": _YARN}
_NEEDED = {"default": (), "llama3": _LLAMA3, "yarn": _YARN[:2]}


def rope_of(
    config: Config, *, default_base: float, default: Config | None = None, part: bool = False
) -> tuple[float, Scaling | None]:
    """The base of the frequencies, and how they are stretched for long texts.

    `default`: what the family takes where the file says nothing. `part`: only a part of a head may be rotated
    (`rotated_share`). ValueError where two entries contradict each other, where types of layers differ, or where
    positions are of a type that is not here; it names the entries.
    """
    values = _said(config, default)
    kind, share = values.pop("rope_type", "default"), values.get("partial_rotary_factor", 1.0)
    if kind not in _FIELDS or (share != 1.0 and not part):
        raise ValueError(
            f"config.json: rotary positions of type {kind!r} ({values}); ours are of type 'default', 'llama3' or "
            "'yarn', of all of a head (partial_rotary_factor 1)"
        )
    for name, value in values.items():
        if name not in (*_FIELDS[kind], "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
            where = _joined(_parts(config))[name][0]
            raise ValueError(f"config.json: {where}={value!r} says nothing to rotary positions of type {kind!r}")
    base = number(values, "rope_theta", default_base)
    missing = [field for field in _NEEDED[kind] if field not in values]
    if missing:
        raise ValueError(f"config.json: rotary positions of type {kind!r} need {missing[0]} ({values})")
    if kind == "yarn":
        return base, _yarn(values)
    if kind == "default":
        return base, None
    factor, low, high = (number(values, field, 0.0) for field in _LLAMA3[:3])
    return base, Llama3Scaling(factor, low, high, size(values, _LLAMA3[3]))


def rotated_share(config: Config, default: float) -> float:
    """Which part of a head is rotated, above 0 and at most 1; the default where nothing is said. Else ValueError."""
    share = number(_said(config), "partial_rotary_factor", default)
    if share > 1:
        raise ValueError(f"config.json: partial_rotary_factor={share} of a head is more than all of it")
    return share


def yarn_strength(config: Config) -> float:
    """`mscale_all_dim` of positions by YaRN, where DeepSeek's attention sharpens its scores by it; 0 elsewhere."""
    values = _said(config)
    return number(values, "mscale_all_dim", 0.0) if values.get("mscale_all_dim") else 0.0


def _yarn(values: Config) -> YarnScaling:
    factor, length = number(values, "factor", 1.0), size(values, "original_max_position_embeddings")
    amplitude = sharpening(factor)
    if values.get("mscale") and values.get("mscale_all_dim"):
        amplitude = sharpening(factor, values["mscale"]) / sharpening(factor, values["mscale_all_dim"])
    return YarnScaling(
        factor,
        length,
        fast_turns=number(values, "beta_fast", 32.0),
        slow_turns=number(values, "beta_slow", 1.0),
        whole_places="truncate" not in values or flag(values, "truncate"),
        amplitude=number(values, "attention_factor", amplitude),
    )


def rope_fields(base: float, scaling: Scaling | None) -> dict[str, Any]:
    """Both spellings of it, for a file that is written."""
    said: dict[str, Any] = {"rope_type": "default"}
    if isinstance(scaling, Llama3Scaling):
        said = {"rope_type": "llama3", **dict(zip(_LLAMA3, astuple(scaling), strict=True))}
    elif scaling is not None:
        said = {"rope_type": "yarn", **dict(zip(_YARN, astuple(scaling), strict=False))}
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


def _said(config: Config, default: Config | None = None) -> dict[str, Any]:
    """All values, by their names; the default where there is no type."""
    found = {name: value for name, (_, value) in _joined(_parts(config)).items()}
    return {**(default or {}), **found} if "rope_type" not in found else found


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
