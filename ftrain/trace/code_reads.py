"""What a function's code reads, found from its bytecode: chains of attributes from a variable, and names that may be
attributes of anything.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterator
from dataclasses import dataclass, field

Root = tuple[str, str | int]
"""Where a chain begins: ("global", name), ("variable", name of a variable that the code closes over), ("argument",
position), ("file", name of a module that the code imports).
"""

_BETWEEN = {"CACHE", "COPY", "EXTENDED_ARG", "NOP", "PRECALL", "PUSH_NULL", "RESUME", "COPY_FREE_VARS"}
_WHOLE = {"vars", "asdict", "astuple"}
_BY_NAME = {"getattr", "hasattr"}
_TAKES_NAMES = _BY_NAME | {"attrgetter", "methodcaller", "__getattribute__"}


@dataclass
class Reads:
    """What code reads.

    - `chains`: from a root through attributes, as in `options.optimizer.rate`; the last value is used somehow.
    - `wholes`: chains to objects of which any attribute may be read (`vars(options)`, `getattr(options, name)`).
    - `names`: attributes of values whose origin is not known, such as arguments and locals.
    - `inherited`: attributes of `super()`.
    - `any_name`: whether any attribute of any value may be read, since the code has its name in a variable.
    """

    chains: set[tuple[Root, tuple[str, ...]]] = field(default_factory=set)
    wholes: set[tuple[Root, tuple[str, ...]]] = field(default_factory=set)
    names: set[str] = field(default_factory=set)
    inherited: set[str] = field(default_factory=set)
    any_name: bool = False


@functools.lru_cache(maxsize=4096)
def reads_of(code: types.CodeType) -> Reads:
    """What `code` reads, the functions within it included.

    >>> from ftrain.trace.code_reads import reads_of
    >>> reads = reads_of((lambda x: x.sum() * options.rate).__code__)
    >>> sorted(reads.chains)
    [(('argument', 0), ('sum',)), (('global', 'options'), ('rate',))]
    """
    found = Reads()
    arguments = _arguments_of(code)
    assigned = _assigned_in(code) & arguments.keys()
    found.chains.update((("argument", arguments[name]), ()) for name in assigned)  # may be in any variable
    roots: dict[str, Root] = {name: ("argument", at) for name, at in arguments.items() if name not in assigned}
    if code.co_argcount == 0 and code.co_flags & inspect.CO_VARARGS:
        found.chains.add((("argument", 0), ()))  # the first of `*args`
    _Scan(code, found, roots).run()
    for inner in _codes_in(code):
        _add_inner(found, reads_of(inner), {name: ("variable", name) for name in code.co_freevars} | roots)
    return found


def _add_inner(found: Reads, inner: Reads, outside: dict[str, Root]) -> None:
    """Add what a function within reads. `outside`: what variables of the function around it are, where that is known.

    Its own arguments, and other variables of the function around it, may be anything.
    """
    for chains, into in ((inner.chains, found.chains), (inner.wholes, found.wholes)):
        for root, attributes in chains:
            kind, name = root
            outer = outside.get(str(name)) if kind == "variable" else root if kind in ("global", "file") else None
            if outer is not None:
                into.add((outer, attributes))
            else:
                found.names.update(attributes)
                found.any_name |= into is found.wholes
    found.names |= inner.names | inner.inherited
    found.inherited |= inner.inherited
    found.any_name |= inner.any_name


def _arguments_of(code: types.CodeType) -> dict[str, int]:
    """The positions of the arguments, by name."""
    return {name: i for i, name in enumerate(code.co_varnames[: code.co_argcount + code.co_kwonlyargcount])}


def _codes_in(code: types.CodeType) -> Iterator[types.CodeType]:
    """The functions, classes and comprehensions within."""
    return (constant for constant in code.co_consts if isinstance(constant, types.CodeType))


def _assigned_in(code: types.CodeType) -> set[str]:
    """The variables that the code assigns, those of the function around it included (`nonlocal`)."""
    own = {name for at in dis.get_instructions(code) for name in _stored(at)}
    return own.union(*(_assigned_in(inner) & set(inner.co_freevars) for inner in _codes_in(code)))


class _Scan:
    """One pass over the instructions of a code object, which knows the chain that was loaded last."""

    def __init__(self, code: types.CodeType, found: Reads, arguments: dict[str, Root]) -> None:
        self._code, self._found, self._arguments = code, found, arguments
        self._chain: tuple[Root, tuple[str, ...]] | None = None
        self._imported: Root | None = None
        self._asks = ""  # the function that asks an object for attributes, until it is known which
        self._object_loaded = False
        self._on_super = False

    def run(self) -> None:
        for at in dis.get_instructions(self._code):
            self._step(at.opname, at.argval)
        self._end()
        if not _TAKES_NAMES.isdisjoint(self._code.co_names):
            texts = (constant for constant in self._code.co_consts if isinstance(constant, str))
            self._found.names.update(name for text in texts for name in text.split(".") if name.isidentifier())

    def _step(self, op: str, value: object) -> None:
        if op in _BETWEEN:
            return
        if op in ("LOAD_ATTR", "LOAD_METHOD"):
            self._attribute(str(value))
            return
        if op == "LOAD_SUPER_ATTR":
            self._found.inherited.add(str(value))
            self._on_super = False
        if op == "MATCH_CLASS":  # `case Options(rate=r)`; names of positional patterns are in the class
            tuples = (constant for constant in self._code.co_consts if isinstance(constant, tuple))
            self._found.names.update(name for names in tuples for name in names if isinstance(name, str))
            self._found.any_name |= bool(value)
        if op in ("STORE_ATTR", "DELETE_ATTR"):  # no use of the object
            self._chain = None
            return
        if op == "IMPORT_FROM" and self._imported is not None:
            self._end()
            self._chain = (self._imported, (str(value),))
            return
        if self._asks and self._object_loaded and self._asked(op, value):
            return
        self._end()
        self._load(op, value)
        self._object_loaded = bool(self._asks) and value != self._asks

    def _asked(self, op: str, value: object) -> bool:
        """What follows the object in `getattr(object, ...)` or `vars(object)`. True if it was an attribute's name."""
        by_name, self._asks = self._asks in _BY_NAME, ""
        if by_name and op == "LOAD_CONST" and isinstance(value, str):
            self._attribute(value)
            return True
        if self._chain is None:
            self._found.any_name = True
        else:
            self._found.wholes.add(self._chain)
        return False

    def _load(self, op: str, value: object) -> None:
        if op in ("LOAD_GLOBAL", "LOAD_NAME"):
            self._chain = (("global", str(value)), ())
            self._on_super |= value == "super"
            if value in _WHOLE | _BY_NAME:
                self._chain, self._asks, self._object_loaded = None, str(value), False
        elif op in ("LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_FROM_DICT_OR_DEREF"):
            if value in self._arguments:
                self._chain = (self._arguments[str(value)], ())
            elif value in self._code.co_freevars:
                self._chain = (("variable", str(value)), ())
        elif "LOAD_FAST" in op:
            for name in value if isinstance(value, tuple) else (value,):
                self._end()
                if name in self._arguments:
                    self._chain = (self._arguments[str(name)], ())
        elif op == "IMPORT_NAME":
            self._imported = ("file", str(value))
            self._chain = (self._imported, ())

    def _attribute(self, name: str) -> None:
        if self._chain is None:
            (self._found.inherited if self._on_super else self._found.names).add(name)
            self._on_super = False
        elif name == "__dict__":
            self._found.wholes.add(self._chain)
        elif name in _WHOLE:  # dataclasses.asdict
            self._chain, self._asks, self._object_loaded = None, name, False
        else:
            root, attributes = self._chain
            self._chain = (root, (*attributes, name))

    def _end(self) -> None:
        """The chain's value is used by something else than a load of an attribute."""
        if self._chain is not None:
            self._found.chains.add(self._chain)
        self._chain = None


def _stored(at: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction assigns."""
    if not at.opname.startswith(("STORE_FAST", "DELETE_FAST", "STORE_DEREF")):
        return ()
    return at.argval if isinstance(at.argval, tuple) else (at.argval,)
