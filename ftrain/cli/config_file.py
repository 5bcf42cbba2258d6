"""`--config file.yaml`: options of a command from a file, under the same names; flags go before it.

A file is turned into flags that stand before those of the command line, so that both are read by one parser.
"""

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tyro.conf import OmitArgPrefixes

from ftrain.sharding.paths import nearest

FLAG = "--config"


def with_config(options: type, arguments: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` replaced by the flags of the file, for a dataclass `options`.

    A flag that the arguments have too is left out of the file's, and what is behind `--` is no flag. ValueError for a
    file that cannot be read, a key that the options have not (with the nearest one), a key twice, or a value of another
    kind.
    """
    if "config" in _kinds(options):
        return list(arguments)  # a command whose own option it is
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    rest, behind, file = list(arguments[:end]), list(arguments[end:]), None
    while any(word == FLAG or word.startswith(f"{FLAG}=") for word in rest):
        at = next(i for i, word in enumerate(rest) if word == FLAG or word.startswith(f"{FLAG}="))
        if file is not None:
            raise ValueError(f"{FLAG} is given twice: one file holds the options of a run")
        if "=" in rest[at]:
            file = rest.pop(at).partition("=")[2]
        elif at + 1 < len(rest):
            _, file = rest.pop(at), rest.pop(at)
        else:
            raise ValueError(f"{FLAG} needs a file")
    if file is None:
        return rest + behind
    given = {_name(word) for word in rest if word.startswith("--")}
    flags = _flags(read_config_file(Path(file)), options, file, "")
    return [word for name, words in flags if name not in given for word in words] + rest + behind


def read_config_file(file: Path) -> dict[str, Any]:
    """The mapping in a YAML (or JSON) file. ValueError where it cannot be read, is no mapping, or has a key twice."""
    try:
        import yaml
    except ImportError as absent:
        raise ValueError(f'{file}: YAML files need pyyaml: pip install "ftrain-omni[train]"') from absent
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {file}: it cannot be read: {error}") from error

    class Once(yaml.SafeLoader):
        """Refuses a key that a mapping has already."""

    def mapping(loader: Any, node: Any) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in found:
                raise ValueError(f"{file}, line {key_node.start_mark.line + 1}: the key {key!r} is there twice")
            found[key] = loader.construct_object(value_node, deep=True)
        return found

    Once.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        found = yaml.load(text, Loader=Once)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"--config {file}: it is no YAML: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config {file}: it holds {type(found).__name__}, not a mapping of options")
    return found


def _flags(values: Mapping[str, Any], options: type, file: str, under: str) -> list[tuple[str, list[str]]]:
    """Each option of the file by its flag's name, with the words that give it."""
    kinds = _kinds(options)
    found: list[tuple[str, list[str]]] = []
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in kinds:
            near = nearest(name, kinds)
            known = f"; did you mean {under}{near}?" if near else f"; there are {', '.join(sorted(kinds))}"
            raise ValueError(f"{file}: no option is called {under}{key}{known}")
        kind = kinds[name]
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise ValueError(f"{file}: {under}{key} holds options of its own, not {value!r}")
            found += _flags(value, typing.cast(type, kind), file, f"{under}{name}.")
            continue
        if isinstance(value, Mapping):
            raise ValueError(f"{file}: {under}{key} is one option, and the file gives {sorted(value)} below it")
        if value is None and type(None) in typing.get_args(kind):
            continue
        flag = f"--{under}{name}".replace("_", "-")
        if isinstance(value, bool):
            found.append((flag, [flag if value else _negated(flag)]))
        elif isinstance(value, list):
            found.append((flag, [flag, *map(str, value)]))
        else:
            found.append((flag, [flag, str(value)]))
    return found


def as_config(options: Any) -> dict[str, Any]:
    """The values of a dataclass of options as the mapping that a file has: what `--config` takes back."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if not dataclasses.is_dataclass(value):
            found[field.name] = _plain(value)
        elif _is_flat(typing.get_type_hints(type(options), include_extras=True)[field.name]):
            found |= as_config(value)
        else:
            found[field.name] = as_config(value)
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def _kinds(options: type) -> dict[str, Any]:
    """The types of options by name; those of a group without a prefix stand beside the others."""
    found: dict[str, Any] = {}
    for name, kind in typing.get_type_hints(options, include_extras=True).items():
        plain = typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind
        if _is_flat(kind):
            found |= _kinds(plain)
        elif typing.get_origin(plain) is not typing.ClassVar:
            found[name] = plain
    return found


def _is_flat(kind: Any) -> bool:
    """Whether the options of a group stand without its name before theirs."""
    marks = getattr(OmitArgPrefixes[int], "__metadata__", ())
    return typing.get_origin(kind) is typing.Annotated and kind.__metadata__ == marks


def _name(word: str) -> str:
    name = word.partition("=")[0].replace("_", "-")
    head, _, last = name.rpartition(".")
    if head and last.startswith("no-"):
        return f"{head}.{last.removeprefix('no-')}"
    return f"--{name.removeprefix('--no-')}" if name.startswith("--no-") else name


def _negated(flag: str) -> str:
    head, _, last = flag.rpartition(".")
    return f"{head}.no-{last}" if head else f"--no-{last.removeprefix('--')}"
