"""Layouts and batch rules as plain data, for plan files."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from ftrain.sharding.batch import BatchRows, BatchRule, Offsets, Replicated, TokenIndices, Tokens
from ftrain.sharding.layout import CapacityFactor, Dropless, Hybrid, Layout, Ring, Ulysses

# The words of plan files: a file stays readable when a class gets another name.
_SEQUENCE: Mapping[str, type] = {"ulysses": Ulysses, "ring": Ring, "hybrid": Hybrid}
_EXPERTS: Mapping[str, type] = {"exact": Dropless, "capacity": CapacityFactor}
_RULES: Mapping[str, type] = {
    "tokens": Tokens,
    "rows": BatchRows,
    "places": TokenIndices,
    "same": Replicated,
    "offsets": Offsets,
}
_LATER = ("optional",)
"""What older files do not say."""
_WORD = {kind: word for words in (_SEQUENCE, _EXPERTS, _RULES) for word, kind in words.items()}


def layout_as_dict(layout: Layout) -> dict[str, Any]:
    """A layout as numbers, strings and lists; `layout_from_dict` reads it."""
    return {
        "parameters": list(layout.parameters),
        "sequence": _tagged(layout.sequence),
        "experts": _tagged(layout.experts),
        "expert_chunks": layout.expert_chunks,
        "dtype": layout.dtype,
    }


def layout_from_dict(data: Mapping[str, Any]) -> Layout:
    """The layout that `layout_as_dict` wrote. ValueError names a key or a kind that is unknown."""
    _check_keys(data, {f.name for f in fields(Layout)}, "a layout")
    return Layout(
        parameters=tuple(data["parameters"]),
        sequence=_untagged(data["sequence"], _SEQUENCE, "sequence"),
        experts=_untagged(data["experts"], _EXPERTS, "experts"),
        expert_chunks=data["expert_chunks"],
        dtype=data["dtype"],
    )


def rule_as_dict(rule: BatchRule) -> dict[str, Any]:
    """The rule that divides a batch leaf, as plain data; `rule_from_dict` reads it."""
    return _tagged(rule) or {}


def rule_from_dict(data: Mapping[str, Any]) -> BatchRule:
    """The rule that `rule_as_dict` wrote. ValueError names a kind or a key that is unknown."""
    return _untagged(data, _RULES, "batch rule")


def _tagged(value: Any) -> dict[str, Any] | None:
    return None if value is None else {"kind": _WORD[type(value)], **asdict(value)}


def _untagged(data: Mapping[str, Any] | None, kinds: Mapping[str, type], what: str) -> Any:
    if data is None:
        return None
    kind = kinds.get(str(data.get("kind")))
    if kind is None:
        raise ValueError(f"{what} {data.get('kind')!r} is not one of {', '.join(kinds)}")
    given = {name: value for name, value in data.items() if name != "kind"}
    known = {f.name: f.default for f in fields(kind)}
    later = {name for name in _LATER if known.get(name, MISSING) is not MISSING}
    _check_keys(given, set(known) - (later - set(given)), f"{what} {data['kind']!r}")
    return kind(**given)


def _check_keys(data: Mapping[str, Any], known: set[str], what: str) -> None:
    if set(data) != known:
        raise ValueError(f"{what} has the keys {sorted(known)}; got {sorted(data)}")
