"""The workspace that each op declares is what the allocator sees while it runs."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from ftrain.kernels import embedding, grouped_mm, memory_scan, moe, philox, random, rms_norm, rope, swiglu

FILES = (embedding, grouped_mm, memory_scan, moe, philox, rms_norm, rope, swiglu)
RULES = {name: rule for file in FILES for name, rule in file.WORKSPACE.items()}
N, D = 8192, 256
SLACK = 1 << 16  # statistics of rows and other vectors that no rule counts


def measured(op, arguments) -> int:
    """Peak bytes held while the op runs, less its outputs."""
    op(*arguments)  # what torch allocates once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        outputs = op(*arguments)
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert held == sum(t.numel() * t.element_size() for t in ([outputs] if torch.is_tensor(outputs) else outputs))
    return peak - held


def cases(dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, weight = torch.randn(N, D).to(dtype), torch.randn(N, D).to(dtype), torch.rand(D, dtype=wide)
    fused = torch.randn(N, 3 * D).to(dtype)
    heads = fused.view(N, 12, 64)[:, :4]
    order, routing = torch.randperm(N), torch.rand(N // 2, 2, dtype=wide)
    cos, sin = rope.rope_table(torch.arange(N), head_dim=64, dtype=wide)
    offsets, w = torch.tensor([0, N, N, N], dtype=torch.int32), torch.randn(4, D, 128).to(dtype)
    tokens, index = torch.randint(0, 1000, (N,)), torch.where(torch.arange(500) < 490, torch.arange(500), N)
    yield "rms_norm", (x, weight, 1e-6)
    yield "rms_norm", (heads, weight[:64], 1e-6)
    yield "rms_norm_backward", (dy, x, weight, torch.ones(N, 1, dtype=wide))
    yield "rms_norm_backward", (heads, heads, weight[:64], torch.ones(N, 4, 1, dtype=wide))
    yield "swiglu", (x, dy)
    yield "swiglu_backward", (dy, fused[:, :D], fused[:, D : 2 * D])
    for layout in ("half", "interleaved"):
        yield "rope", (x.view(N, 4, 64), cos, sin, layout, False)
        yield "rope", (heads, cos[:, :16], sin[:, :16], layout, True)
    yield "combine", (x, routing, order, 2)
    yield "combine", (x, None, order, 1)
    yield "combine_backward", (dy[: N // 2], x, routing, order)
    yield "embedding", (tokens, x)
    yield "embedding_backward", (dy, tokens, 1000)
    yield "merge_rows", (x, dy[:500], index)
    yield "merge_rows_backward", (dy, index)
    steps, states = torch.randn(1, 16, 8, 64, 128).to(dtype), torch.randn(1, 16, 8, 128, 96).to(dtype)
    yield "memory_scan", (steps[..., 0, 0], steps, steps, states)
    yield "grouped_mm", (x, w, offsets)
    yield "grouped_mm_backward_x", (dy[:, :128], w, offsets)
    yield "grouped_mm_backward_w", (dy[:, :128], x, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_declared_is_measured(dtype):
    for name, arguments in cases(dtype):
        rule = RULES.get(f"ftrain::{name}", lambda *_: 0)
        declared, seen = rule(*arguments), measured(getattr(torch.ops.ftrain, name).default, arguments)
        assert abs(declared - seen) <= SLACK, f"{name} {[tuple(a.shape) for a in arguments if torch.is_tensor(a)]}"


@pytest.mark.parametrize("kind", ["bits", "uniform", "normal"])
@pytest.mark.parametrize("base", [None, torch.tensor(3)])
@pytest.mark.parametrize("n", [1000, 1 << 20])
def test_random_numbers_hold_one_pass(kind, base, n):
    dtype = torch.int64 if kind == "bits" else torch.float32
    arguments = (random.key(0), base, (n + 3,), (n,), kind, dtype, 0.0)
    declared = RULES["ftrain::philox"](*arguments)
    assert abs(declared - measured(torch.ops.ftrain.philox.default, arguments)) <= 0.03 * declared + 1024


def test_rules_need_shapes_alone():
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name, arguments in cases(torch.bfloat16):
            fake = [mode.from_tensor(a) if torch.is_tensor(a) else a for a in arguments]
            rule = RULES.get(f"ftrain::{name}", lambda *_: 0)
            assert isinstance(rule(*fake), int), name
