"""What ranks hold of whole leaves, for the tests of this folder."""

from ftrain.sharding.processes import DeviceMeshes, to_dtensor


def on_mesh(whole, placements, mesh, rank, device="cpu"):
    """What a rank holds of whole leaves by name: DTensors where a placement divides them. On "meta": its shape."""
    meshes = DeviceMeshes(mesh, "cpu")
    return {
        name: to_dtensor(placement.shard(whole[name], mesh, rank).to(device), placement, mesh, rank, meshes)
        for name, placement in placements.items()
    }
