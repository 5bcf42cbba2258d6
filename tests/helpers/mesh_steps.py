"""Steps of the small models on a virtual mesh of eight ranks, over a link of one's choice."""

import torch

import ftrain
from ftrain.sharding import Layout, Mesh, Plan
from ftrain.sharding.link import Link

MESH = Mesh(2, 2, 2, 2, "virtual")


SLOW = Link(latency=50.0, bandwidth=50e6)


SMALL = Link(latency=0.0, bandwidth=50e6)  # no message is worth joining to another


def step_of(model, *, overlap=True, link=SLOW, mesh=MESH, layout=None, **options):
    plan = Plan(mesh, layout or Layout(), batch=model.rules, link=link)
    return ftrain.jit(model.step, plan=plan, specs=model.specs, overlap=overlap, **options)


def lowered(model, **options):
    step = step_of(model, **options)
    mesh = options.get("mesh", MESH)
    return step.lower(model.params(torch.float32), model.batch(mesh.replicate * mesh.shard))
