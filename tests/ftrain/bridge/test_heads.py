"""The scores of a head that are not computed yet become a tensor wherever a model does something else with them."""

import torch
from torch.nn import functional as F

from ftrain.bridge.heads import HeadReads, Scores


def test_scores_become_a_tensor_within_the_call():
    x, w, b = torch.randn(5, 3), torch.randn(7, 3), torch.randn(7)
    expected = F.linear(x, w, b)
    with HeadReads(w):
        scores = F.linear(x, w, b)
        assert isinstance(scores, Scores)
        torch.testing.assert_close(scores.view(35), expected.view(35))
        torch.testing.assert_close(scores[0], expected[0])
