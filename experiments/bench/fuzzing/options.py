"""Random options of a step."""

import random

from experiments.bench.fuzzing.program import Options

_REMATS = (
    '"layer"', '"all"', '"all"', "Remat(us_per_mb=1.0)", "Remat(us_per_mb=1000000.0)", "Remat(budget=6000)",
    "Remat(budget=60000)", 'Remat(paths={"*": "recompute"})',
)  # fmt: skip
_MESHES = (
    'Mesh(shard=2, kind="virtual")', 'Mesh(2, kind="virtual")', 'Mesh(2, 2, kind="virtual")',
    'Mesh(shard=2, sequence=2, kind="virtual")', 'Mesh(sequence=2, kind="virtual")', 'Mesh(shard=4, kind="virtual")',
)  # fmt: skip
_LAYOUTS = ("Layout()", "Layout()", 'Layout(parameters=("shard",))', "Layout(parameters=())")
_ROWS = ((8,), (8, 8), (8, 8), (8, 8), (8, 8, 8), (8, 8, 8), (8, 8), (8, 16), (8, 16, 8))


def random_options(rng: random.Random) -> Options:
    """Options such as users give: most steps have one or two."""
    on_mesh = rng.random() < 0.18
    return Options(
        donate=rng.random() < 0.45,
        remat=rng.choice(_REMATS) if rng.random() < 0.4 else None,
        backend="inductor" if not on_mesh and rng.random() < 0.01 else "aten",
        precision="bfloat16" if rng.random() < 0.04 else None,
        mesh=rng.choice(_MESHES) if on_mesh else None,
        layout=rng.choice(_LAYOUTS),
        overlap=not on_mesh or rng.random() < 0.8,
        rows=rng.choice(_ROWS),
    )
