"""The one language of globs over dotted paths: in plans, batch rules, recomputation, groups of an optimizer.

A path names a leaf of a tree, `layers.3.attention.w_q`. A glob has parts as well: a name is that part, `*` any one
part, `**` any number of them (none included), and within a part `*`, `?` and `[...]` are as in a shell (`w_*`). It must
match the whole path. Of several globs that match, the most specific decides: the one with more parts that are names,
then with more that are partly so, then with more `*`. The order in which rules are written means nothing.
"""

import difflib
import fnmatch
import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Generic, TypeVar

T = TypeVar("T")


def match(path: str, glob: str) -> bool:
    """True if the glob matches the whole dotted path.

    `layers.*.w` matches `layers.3.w`; `encoders.**` all below `encoders` (and itself); `**.w_*` every leaf whose last
    part begins with `w_`.

    >>> from ftrain.sharding.paths import match
    >>> match("layers.3.w", "layers.*.w"), match("layers.3.mlp.w", "layers.*.w"), match("layers.3.mlp.w_up", "**.w_*")
    (True, False, True)
    """
    return _match(tuple(path.split(".")), tuple(glob.split(".")))


def specificity(glob: str) -> tuple[int, int, int]:
    """How many parts are names, how many are partly so, how many are `*`: of two globs the greater decides.

    >>> from ftrain.sharding.paths import specificity
    >>> specificity("layers.*.w_*"), specificity("**.w_*")
    ((1, 1, 1), (0, 1, 0))
    """
    parts = [part for part in glob.split(".") if part != "**"]
    names = sum(not _is_wild(part) for part in parts)
    stars = sum(part == "*" for part in parts)
    return names, len(parts) - names - stars, stars


def nearest(name: str, known: Iterable[str], *, cutoff: float = 0.5) -> str | None:
    """The known name most like `name`, for "did you mean" messages; None where nothing comes close.

    `cutoff`: how alike, from 0 (anything) to 1 (equal), by `difflib.get_close_matches`.

    >>> from ftrain.sharding.paths import nearest
    >>> nearest("atention", ["attention", "mlp"])
    'attention'
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return found[0] if found else None


@dataclass(frozen=True)
class Rules(Generic[T]):
    """Globs over dotted paths and what they decide; the most specific glob that matches decides, and order means
    nothing.

    - `values`: glob -> value. ValueError for a glob with an empty part.
    - `of`: what a message calls the rules, such as "Plan(batch=...)".
    - `below`: a glob names a node of the tree and decides about all leaves below it, as `glob.**` does.

    >>> from ftrain.sharding.paths import Rules
    >>> rules = Rules({"**": "bfloat16", "layers.*.norm": "float32"})
    >>> rules.find("layers.3.norm"), rules.find("layers.3.w")
    ('float32', 'bfloat16')
    >>> rules.require_used(["layers.0.w"])
    Traceback (most recent call last):
    ValueError: rules: 'layers.*.norm' matches nothing; nearest: 'layers.0.w'
    """

    values: Mapping[str, T] = field(default_factory=lambda: MappingProxyType({}))
    of: str = "rules"
    below: bool = False

    def __post_init__(self) -> None:
        for glob in self.values:
            if not isinstance(glob, str) or not all(glob.split(".")):
                raise ValueError(f"{self.of}: {glob!r} is no glob over dotted paths, such as 'layers.*.w' or 'head.**'")

    def glob_of(self, path: str) -> str | None:
        """The glob that decides about `path`; None where none matches.

        ValueError where two that decide differently are equally specific.
        """
        found = [glob for glob in self.values if self._matches(path, glob)]
        if not found:
            return None
        most = max(specificity(glob) for glob in found)
        best = [glob for glob in found if specificity(glob) == most]
        rivals = [glob for glob in best[1:] if self.values[glob] != self.values[best[0]]]
        if rivals:
            raise ValueError(
                f"{self.of}: {best[0]!r} and {rivals[0]!r} both match {path!r} and neither is more specific: add a "
                f"rule that is, such as {path!r}"
            )
        return best[0]

    def find(self, path: str, default: T | None = None) -> T | None:
        """What the rules say about `path`, or the default where they say nothing. ValueError as in `glob_of`."""
        glob = self.glob_of(path)
        return default if glob is None else self.values[glob]

    def names(self, path: str) -> bool:
        """True where the glob that decides about `path` is about it in particular: not made of `*` alone.

        ValueError as in `glob_of`.
        """
        glob = self.glob_of(path)
        return glob is not None and specificity(glob)[:2] != (0, 0)

    def require_used(self, paths: Iterable[str], *, unless: Callable[[T], bool] = lambda _: False) -> None:
        """ValueError that names a glob which matches none of `paths`, and the nearest of them.

        `unless`: true of a value whose glob need not match.
        """
        known = list(paths)
        for glob, value in self.values.items():
            if not unless(value) and not any(self._matches(path, glob) for path in known):
                raise ValueError(f"{self.of}: {glob!r} matches nothing{_hint(glob, known)}")

    def _matches(self, path: str, glob: str) -> bool:
        return match(path, f"{glob}.**" if self.below else glob)

    def table(self, paths: Iterable[str]) -> str:
        """One line per path: the path, the glob that decides about it, and what it says."""
        rows = []
        for path in paths:
            glob = self.glob_of(path)
            rows.append((path, "-" if glob is None else glob, "" if glob is None else str(self.values[glob])))
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}".rstrip() for a, b, c in rows)


def _hint(glob: str, known: list[str]) -> str:
    """What to write instead, or what paths look like."""
    if not known:
        return ": there are no paths"
    if any(match(path, f"{glob}.**") for path in known):
        return f"; all below it are {glob + '.**'!r}"
    if any(match(path, f"**.{glob}") for path in known):
        return f"; a glob begins at the root, anywhere is {'**.' + glob!r}"
    return f"; nearest: {nearest(glob, known, cutoff=0.0)!r}"


def _is_wild(part: str) -> bool:
    return any(c in part for c in "*?[")


@functools.lru_cache(maxsize=1 << 16)
def _match(parts: tuple[str, ...], patterns: tuple[str, ...]) -> bool:
    if not patterns:
        return not parts
    if patterns[0] == "**":
        return any(_match(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], patterns[0]) and _match(parts[1:], patterns[1:])
