"""Gradients of depthwise convolutions, against those of PyTorch's own."""

from copy import deepcopy

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from container.training import speed_up_depthwise


def depthwise(kernel=5, channels=3, **kwargs):
    return nn.Conv2d(channels, channels, kernel, groups=channels, **kwargs)


@pytest.mark.parametrize("kernel", [4, 5, 7, (3, 5), (7, 9)])
@pytest.mark.parametrize("padding", [0, 2, (3, 1)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_those_of_finite_differences(kernel, padding, bias):
    conv = depthwise(kernel, channels=2, padding=padding, bias=bias).double()
    assert speed_up_depthwise(conv) == 1
    x = torch.randn(2, 2, 9, 10, dtype=torch.double, requires_grad=True)
    parameters = tuple(parameter.detach().requires_grad_() for parameter in conv.parameters())
    names = [name for name, _ in conv.named_parameters()]

    def forward(x, *parameters):
        return torch.func.functional_call(conv, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(forward, (x, *parameters))


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("name", ["container_light_nano_32", "convnext_atto"])
def test_a_model_learns_the_same(name, amp):
    torch.manual_seed(0)
    plain = timm.create_model(name, num_classes=10).to(memory_format=torch.channels_last)
    fast = deepcopy(plain)
    wide = [m for m in plain.modules() if type(m) is nn.Conv2d and m.groups > 1 and m.kernel_size[0] > 3]
    assert speed_up_depthwise(fast) == len(wide) > 0
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    for model in (plain, fast):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            loss = nn.functional.cross_entropy(model(images).float(), torch.arange(4))
        loss.backward()
        model.loss = loss.item()
    assert fast.loss == plain.loss
    bound = 2e-2 if amp else 1e-5
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        if a.grad is None:
            assert b.grad is None, name
        else:
            assert (a.grad - b.grad).norm() <= bound * b.grad.norm() + 1e-7, name


def test_only_those_that_gain_are_taken():
    class Own(nn.Conv2d):
        pass

    others = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 5),
            nn.Conv2d(4, 4, 5, groups=2),
            nn.Conv2d(4, 8, 5, groups=4),
            depthwise(3),
            depthwise(stride=2),
            depthwise(dilation=2),
            depthwise(padding="same"),
            depthwise(padding=2, padding_mode="reflect"),
            Own(3, 3, 5, groups=3),
        ]
    )
    assert speed_up_depthwise(others) == 0
    assert speed_up_depthwise(nn.Sequential(depthwise(), depthwise((1, 5)), *others)) == 2


def test_frozen_weights_and_fixed_images_get_none():
    conv = depthwise(padding=2)
    speed_up_depthwise(conv)
    conv(torch.randn(2, 3, 8, 8)).sum().backward()  # the images want none
    assert conv.weight.grad.abs().sum() > 0
    frozen = depthwise(padding=2).requires_grad_(False)
    speed_up_depthwise(frozen)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    frozen(images).sum().backward()
    assert images.grad.abs().sum() > 0
    assert frozen.weight.grad is frozen.bias.grad is None


def test_copies_and_hooks_go_on_working():
    conv = depthwise(padding=2)
    speed_up_depthwise(conv)
    copy = deepcopy(conv)
    images = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        conv.weight.zero_()
    assert conv(images).std((0, 2, 3)).max() == 0
    assert copy(images).std() > 0
    prune.l1_unstructured(copy, "weight", 0.5)  # by a hook that sets the weight
    copy(images).sum().backward()
    assert (copy.weight_orig.grad == 0).sum() >= copy.weight_mask.numel() // 2


def test_second_derivatives_are_refused_in_one_line():
    conv = depthwise(padding=2)
    speed_up_depthwise(conv)
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(conv(images).pow(2).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch 2.7's own compiler does
def test_compiled():
    torch.compiler.reset()
    plain = nn.Sequential(depthwise(padding=2), nn.GELU())
    fast = deepcopy(plain)
    speed_up_depthwise(fast)
    images = torch.randn(2, 3, 8, 8)
    plain(images).sum().backward()
    torch.compile(fast, backend="aot_eager", fullgraph=True)(images).sum().backward()
    torch.testing.assert_close(fast[0].weight.grad, plain[0].weight.grad)
    torch.testing.assert_close(fast[0].bias.grad, plain[0].bias.grad)
