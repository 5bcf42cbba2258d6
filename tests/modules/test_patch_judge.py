"""The judge of patches: hinge losses by hand, gradients by differences, and a judge that learns to tell."""

import pytest
import torch

import ftrain
from ftrain import tree
from ftrain.modules import patch_judge
from ftrain.modules.patch_judge import JudgeConfig

CFG = JudgeConfig(width=8, layers=1)


def pictures(seed: int, count: int = 4) -> torch.Tensor:
    return torch.randn(count, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).double()


def judge():
    return tree.map(lambda p: p.double(), ftrain.init(patch_judge.specs(CFG), ftrain.key(0)))


def test_losses_are_hinges_over_patches() -> None:
    params, real, made = judge(), pictures(0), pictures(1) * 3
    of_real, of_made = (patch_judge.apply(params, x, CFG) for x in (real, made))
    wanted = ((1 - of_real).clamp_min(0).mean() + (1 + of_made).clamp_min(0).mean()) / 2
    torch.testing.assert_close(patch_judge.judge_loss(params, real, made, CFG).value(), wanted)
    torch.testing.assert_close(patch_judge.fool_loss(params, made, CFG).value(), -of_made.mean())


def test_gradients_are_those_of_differences() -> None:
    params, made = judge(), pictures(1, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: patch_judge.fool_loss(params, x, CFG).value(), (made,), fast_mode=True)
    real = pictures(0, 1).requires_grad_()
    assert not patch_judge.judge_loss(params, real, made, CFG).value().requires_grad  # it leaves the pictures alone


def test_a_picture_does_not_change_what_is_said_of_another() -> None:
    params, several = judge(), pictures(2)
    alone = torch.cat([patch_judge.apply(params, one[None], CFG) for one in several])
    torch.testing.assert_close(patch_judge.apply(params, several, CFG), alone)


def test_it_learns_to_tell_smooth_pictures_from_noise() -> None:
    real, made = torch.nn.functional.avg_pool2d(pictures(0), 3, 1, 1) * 3, pictures(1)
    gradient = torch.func.grad_and_value(lambda p: patch_judge.judge_loss(p, real, made, CFG).value())
    params, losses = judge(), []
    for _ in range(25):
        grads, value = gradient(params)
        params = tree.map(lambda p, g: p - 0.3 * g, params, grads)
        losses.append(value.item())
    assert losses[-1] < 0.3 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="needs sides of at least 32 pixels; give it fewer layers"):
        patch_judge.apply(
            ftrain.init(patch_judge.specs(JudgeConfig(width=8)), ftrain.key(0)), pictures(0), JudgeConfig()
        )
    with pytest.raises(ValueError, match=r"\[2, 3, 12, 12\] were made, and real ones are \[4, 3, 12, 12\]"):
        patch_judge.judge_loss(judge(), pictures(0), pictures(1, 2), CFG)
    with pytest.raises(ValueError, match="groups=8 must divide width=12"):
        JudgeConfig(width=12)
