"""What no linter knows of docstrings here: that public names have one, and that it names errors and shapes.

    python .ci/docstrings.py

Checks the floors, rooms and files in DONE; prints what is missing and exits with 1 if anything is. For every public
function, class and method (nested functions and what begins with an underscore are private):

- there is a docstring, its own or that of the method which it overrides;
- each exception that its body raises is named in it: by `raise X(...)`, there or in a private function or method of
  the same module that it calls directly, outside a `try` that takes it. A class answers for `__init__` and
  `__post_init__`, in its own docstring or in theirs;
- if it takes tensors whose names carry no shape suffix, as `x_TD` does, the docstring says a shape.

Modules in EXAMPLES have a doctest at least; tests/test_doctests.py runs them all.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]

DONE: tuple[str, ...] = (
    "kernels",
    "sharding",
    "modules",
    "ftrain/lazy.py",
    "ftrain/tree.py",
    "ftrain/bridge",
    "ftrain/optim",
    "ftrain/graph",
    "ftrain/trace",
    "ftrain/analysis",
    "ftrain/passes",
    "ftrain/step",
    "ftrain/runtime",
    "ftrain/remat",
    "ftrain/report",
    "ftrain/debug",
    "ftrain/profile",
    "ftrain/plan",
    "ftrain/run",
    "ftrain/cli",
    "ftrain/checkpoint",
    "ftrain/hf",
    "ftrain/resilience",
    "ftrain/files",
    "ftrain/data",
)
"""Floors, rooms and files whose docstrings are checked, relative to the root."""

EXAMPLES: tuple[str, ...] = (
    "kernels/adamw.py",
    "kernels/attention.py",
    "kernels/attention_cost.py",
    "kernels/backend.py",
    "kernels/chunks.py",
    "kernels/documents.py",
    "kernels/dtypes.py",
    "kernels/embedding.py",
    "kernels/experts.py",
    "kernels/grouped_mm.py",
    "kernels/layer_norm.py",
    "kernels/linear_cross_entropy.py",
    "kernels/mean.py",
    "kernels/moe.py",
    "kernels/opaque.py",
    "kernels/pack.py",
    "kernels/philox.py",
    "kernels/primitive.py",
    "kernels/random.py",
    "kernels/rms_norm.py",
    "kernels/rope.py",
    "kernels/squares.py",
    "kernels/swiglu.py",
    "kernels/wide_mm.py",
    "sharding/batch.py",
    "sharding/bits.py",
    "sharding/experts.py",
    "sharding/layout.py",
    "sharding/link.py",
    "sharding/logical_axes.py",
    "sharding/mesh.py",
    "sharding/paths.py",
    "sharding/placement.py",
    "sharding/plan.py",
    "sharding/ring.py",
    "sharding/spmd.py",
    "sharding/ulysses.py",
    "modules/attention.py",
    "modules/audio_encoder.py",
    "modules/autoregression.py",
    "modules/block.py",
    "modules/budget.py",
    "modules/dealing.py",
    "modules/decoder.py",
    "modules/decoder_config.py",
    "modules/dit.py",
    "modules/embedding.py",
    "modules/encoder_stack.py",
    "modules/generation.py",
    "modules/hf_config.py",
    "modules/hf_fields.py",
    "modules/hf_names.py",
    "modules/kv_cache.py",
    "modules/layers.py",
    "modules/linear.py",
    "modules/mesh_packing.py",
    "modules/mlp.py",
    "modules/moe.py",
    "modules/norm.py",
    "modules/omni.py",
    "modules/packing.py",
    "modules/packs.py",
    "modules/sampling.py",
    "modules/spec.py",
    "modules/vision_encoder.py",
    "modules/vq_image.py",
    "ftrain/optim/adafactor.py",
    "ftrain/optim/adamw.py",
    "ftrain/optim/clip.py",
    "ftrain/optim/combine.py",
    "ftrain/optim/ema.py",
    "ftrain/optim/lion.py",
    "ftrain/optim/master.py",
    "ftrain/optim/muon.py",
    "ftrain/optim/nonfinite.py",
    "ftrain/optim/norms.py",
    "ftrain/optim/optax_names.py",
    "ftrain/optim/schedules.py",
    "ftrain/optim/sgd.py",
    "ftrain/optim/stochastic.py",
    "ftrain/optim/transform.py",
    "ftrain/graph/collectives.py",
    "ftrain/graph/layers.py",
    "ftrain/graph/loop.py",
    "ftrain/graph/op_effects.py",
    "ftrain/graph/text.py",
    "ftrain/analysis/cluster.py",
    "ftrain/analysis/hardware.py",
    "ftrain/analysis/meter.py",
    "ftrain/analysis/op_times.py",
    "ftrain/analysis/pieces.py",
    "ftrain/trace/accumulate.py",
    "ftrain/trace/captured.py",
    "ftrain/trace/grad.py",
    "ftrain/trace/precision.py",
    "ftrain/trace/surroundings.py",
    "ftrain/trace/tracer.py",
    "ftrain/step/api.py",
    "ftrain/step/artifact.py",
    "ftrain/step/state.py",
    "ftrain/runtime/host_copy.py",
    "ftrain/remat/mincut.py",
    "ftrain/remat/policy.py",
    "ftrain/report/out_of_memory.py",
    "ftrain/report/step_page.py",
    "ftrain/debug/finite.py",
    "ftrain/debug/pass_check.py",
    "ftrain/profile/nodes.py",
    "ftrain/plan/jit.py",
    "ftrain/plan/space.py",
    "ftrain/run/session.py",
    "ftrain/cli/plan.py",
    "ftrain/files/beneath.py",
    "ftrain/files/outside.py",
    "ftrain/checkpoint/arrays.py",
    "ftrain/checkpoint/bucket.py",
    "ftrain/checkpoint/checkpointer.py",
    "ftrain/checkpoint/clean.py",
    "ftrain/checkpoint/dtypes.py",
    "ftrain/checkpoint/open_store.py",
    "ftrain/checkpoint/ranks.py",
    "ftrain/checkpoint/read.py",
    "ftrain/checkpoint/retention.py",
    "ftrain/checkpoint/shard_layout.py",
    "ftrain/checkpoint/write.py",
    "ftrain/hf/convert.py",
    "ftrain/hf/files.py",
    "ftrain/hf/load.py",
    "ftrain/hf/save.py",
    "ftrain/hf/shards.py",
    "ftrain/resilience/anomalies.py",
    "ftrain/resilience/failure_dump.py",
    "ftrain/resilience/replay.py",
    "ftrain/resilience/replicas.py",
    "ftrain/resilience/rollback.py",
    "ftrain/resilience/signals.py",
    "ftrain/resilience/skipped.py",
    "ftrain/resilience/watchdog.py",
    "ftrain/lazy.py",
    "ftrain/tree.py",
)
"""Files whose docstrings hold an example that runs."""

Function = ast.FunctionDef | ast.AsyncFunctionDef

_SUFFIX = re.compile(r"_(?:[a-z]?[A-Z0-9]+|[a-z])$")
_SHAPE = re.compile(r"\[[^\]\n]*\]|\b0-d\b|\bscalars?\b|shapes?\b|\belementwise\b", re.IGNORECASE)
_OF_CLASS = ("__init__", "__post_init__", "__new__")


class Public(NamedTuple):
    """A public name of a module: a function, a method or a class, with the class that it belongs to."""

    name: str
    node: Function | ast.ClassDef
    owner: ast.ClassDef | None


def files() -> list[Path]:
    """The Python files of DONE."""
    found = []
    for name in DONE:
        path = ROOT / name
        if not path.exists():
            raise SystemExit(f"{name} of DONE is not there (.ci/docstrings.py)")
        found += [path] if path.suffix == ".py" else sorted(path.rglob("*.py"))
    return found


def public_names(tree: ast.Module) -> Iterator[Public]:
    """What a module shows: functions, classes and their methods, in order. Overloads, which are types, are no names."""
    for node in tree.body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_") and not _is_overload(node):
            yield Public(node.name, node, None)
            if isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, Function) and not n.name.startswith("_"))
                yield from (Public(f"{node.name}.{n.name}", n, node) for n in methods)


def _is_overload(node: Function | ast.ClassDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "overload" for d in node.decorator_list)


def docstring(public: Public, tree: ast.Module) -> str | None:
    """Its own; of a method without one that of a base class in the same module, as `inspect.getdoc` has it."""
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    said, owner = ast.get_docstring(public.node), public.owner
    while not said and owner is not None:
        owner = next((classes[b.id] for b in owner.bases if isinstance(b, ast.Name) and b.id in classes), None)
        methods = owner.body if owner else []
        same = (n for n in methods if isinstance(n, Function) and n.name == public.node.name)
        said = next((ast.get_docstring(n) for n in same), None)
    return said


def raised(public: Public, tree: ast.Module) -> set[str]:
    """Names of the exceptions that it raises itself, or by a private function of the module that it calls."""
    if isinstance(public.node, ast.ClassDef):
        bodies = [n for n in public.node.body if isinstance(n, Function) and n.name in _OF_CLASS]
        owner: ast.ClassDef | None = public.node
    else:
        bodies, owner = [public.node], public.owner
    private = {n.name: n for n in tree.body if isinstance(n, Function) and n.name.startswith("_")}
    methods = {n.name: n for n in owner.body if isinstance(n, Function)} if owner else {}
    found = set[str]()
    for body in bodies:
        found |= _raised_in(body)
        for call, taken in _calls(body):
            if isinstance(call, ast.Name) and call.id in private:
                found |= _raised_in(private[call.id]) - taken
            elif isinstance(call, ast.Attribute) and call.attr.startswith("_") and _is_self(call.value):
                found |= _raised_in(methods[call.attr]) - taken if call.attr in methods else set()
    return found


def _calls(node: ast.AST, taken: frozenset[str] = frozenset()) -> Iterator[tuple[ast.expr, frozenset[str]]]:
    """What is called within a node, and the exceptions that a `try` around the call takes."""
    if isinstance(node, ast.Call):
        yield node.func, taken
    if isinstance(node, ast.Try):
        named = {
            n.id for handler in node.handlers if handler.type for n in ast.walk(handler.type) if isinstance(n, ast.Name)
        }
        for child in node.body:
            yield from _calls(child, taken | named)
        rest: list[ast.AST] = [*node.handlers, *node.orelse, *node.finalbody]
    else:
        rest = list(ast.iter_child_nodes(node))
    for child in rest:
        yield from _calls(child, taken)


def _of_making(node: Function | ast.ClassDef) -> list[str]:
    """The docstrings of what makes an object of a class, which `help` shows below the class's own."""
    makers = (n for n in node.body if isinstance(n, Function) and n.name in _OF_CLASS)
    return [ast.get_docstring(n) or "" for n in makers] if isinstance(node, ast.ClassDef) else []


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "self"


def _raised_in(body: ast.AST) -> set[str]:
    """The classes of `raise X(...)` and `raise X`; `raise` alone and `raise error` say no name."""
    found = set[str]()
    for node in ast.walk(body):
        if isinstance(node, ast.Raise) and node.exc is not None:
            what = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = what.attr if isinstance(what, ast.Attribute) else what.id if isinstance(what, ast.Name) else ""
            if name[:1].isupper():
                found.add(name)
    return found


def unshaped(node: Function | ast.ClassDef) -> list[str]:
    """Arguments that are tensors and whose names carry no shape."""
    if isinstance(node, ast.ClassDef):
        return []
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return [a.arg for a in given if _is_tensor(a.annotation) and not _SUFFIX.search(a.arg)]


def _is_tensor(annotation: ast.expr | None) -> bool:
    """`Tensor`, or `Tensor | None`: not a function or a container of tensors."""
    if isinstance(annotation, ast.BinOp):
        return _is_tensor(annotation.left) or _is_tensor(annotation.right)
    name = annotation.attr if isinstance(annotation, ast.Attribute) else getattr(annotation, "id", "")
    return name == "Tensor"


_BASES = {"Untraceable": "ValueError"}
"""What users know an exception as."""


def missing(path: Path) -> Iterator[str]:
    """What the public names of a file lack, a line for each."""
    tree = ast.parse(path.read_text())
    inside = path.relative_to(ROOT)
    if not ast.get_docstring(tree):
        yield f"{inside}:1: the module has no docstring"
    for public in public_names(tree):
        at, said = f"{inside}:{public.node.lineno}: {public.name}", docstring(public, tree)
        if not said:
            yield f"{at} has no docstring"
            continue
        errors = "\n".join([said, *_of_making(public.node)])
        for name in sorted(raised(public, tree)):
            names = f"{name}|{_BASES[name]}" if name in _BASES else name
            if not re.search(rf"\b({names})\b", errors):
                yield f"{at} raises {name} and does not say so"
        bare = unshaped(public.node)
        if bare and not _SHAPE.search(said):
            yield f"{at} does not say the shapes of {', '.join(bare)}"


def without_example() -> Iterator[str]:
    """The files of EXAMPLES that have none."""
    yield from (f"{name}:1: no example (>>>)" for name in EXAMPLES if ">>> " not in (ROOT / name).read_text())


def main() -> int:
    """Print what is missing; 1 if anything is."""
    checked = files()
    wrong = [line for path in checked for line in missing(path)] + list(without_example())
    print("\n".join(wrong) or f"{len(checked)} files: every public name says its errors and shapes")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
