"""Losses between leaves of an update on a mesh: summed, averaged or not reduced as torch was asked to."""

import pytest
import torch.nn.functional as F

import ftrain
from ftrain.sharding import Layout, Plan
from tests.helpers.divided_updates import MESHES, SPECS, arguments, assert_equal, both, updated

LOSSES = {"mse": F.mse_loss, "l1": F.l1_loss, "smooth l1": F.smooth_l1_loss}


def options(reduction):
    if not isinstance(reduction, tuple):
        return {"reduction": reduction}
    return {"size_average": reduction[0], "reduce": reduction[1]}


# torch has two old options in the place of `reduction`, and warns of them.
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated")
@pytest.mark.parametrize(
    "reduction",
    ["none", "sum", "mean", (False, None), (None, False), (False, True), (True, None), (None, True)],
    ids=str,
)
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_reduced_as_on_one_device(name, reduction):
    loss, how = LOSSES[name], options(reduction)
    assert_equal(*both(updated(lambda w, g: w - g * loss(g, w, **how)), MESHES[0]))


@pytest.mark.parametrize("name", LOSSES)
def test_another_word_for_the_reduction_is_refused_on_pieces_too(name):
    state, batch = arguments()
    step = updated(lambda w, g: w - g * LOSSES[name](g, w, reduction="batchmean"))
    with pytest.raises(ValueError, match="batchmean"):
        ftrain.jit(step, plan=Plan(MESHES[0], Layout()), specs=SPECS)(state, batch)
