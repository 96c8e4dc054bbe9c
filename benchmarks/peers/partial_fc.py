"""The steps of insightface's PartialFC on one device, written out in PyTorch.

Logits in the autocast dtype; the margin on them in float32, by arc cosines and cosines of all of
them and without gradient; softmax and its gradient by hand, with a dense one-hot. At a rate below 1
the classes of the batch and a random sample of the others take part, chosen anew at each call.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementation import Implementation, Loss, Unavailable, require_memory
from fastzoo import ops


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        p = (logits - logits.amax(1, keepdim=True)).exp_()
        p.div_(p.sum(1, keepdim=True))
        ctx.save_for_backward(p, labels)
        return -p.gather(1, labels[:, None]).clamp_min_(1e-30).log_().mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        p, labels = ctx.saved_tensors
        p.sub_(torch.zeros_like(p).scatter_(1, labels[:, None], 1)).div_(len(p))
        return p.mul_(grad), None


def _head(x: Tensor, w: Tensor, labels: Tensor, margin: ops.ArcFace) -> Tensor:
    logits = F.linear(F.normalize(x), F.normalize(w)).float()
    with torch.no_grad():
        angles = logits.arccos_()
        moved = angles.gather(1, labels[:, None]) + margin.m
        logits = angles.scatter_(1, labels[:, None], moved).cos_()
    apply: Callable[..., Tensor] = _CrossEntropy.apply
    return apply(logits * margin.default_scale, labels)


def _sample(classes: int, labels: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """The classes that take part, sorted, and the labels' places among them."""
    generator = torch.Generator(labels.device).manual_seed(0)
    priority = torch.rand(classes, device=labels.device, generator=generator)
    priority[labels] = 2
    index = priority.topk(int(rate * classes)).indices.sort().values
    return index, torch.searchsorted(index, labels)


def head(rate: float, x: Tensor, w: Tensor, y: Tensor, *, margin: ops.ArcFace) -> Loss:
    require_memory(12.0 * len(x) * rate * len(w) + 12.0 * w.numel(), x.device.type)
    inexact = {"margin": margin, "grad": "insightface"}
    if rate == 1:
        return Loss(lambda: _head(x, w, y, margin), (x, w), answers=((x, w, y), inexact))
    index, places = _sample(len(w), y, rate)

    def forward() -> Tensor:
        chosen, labels = _sample(len(w), y, rate)
        return _head(x, w[chosen], labels, margin)

    return Loss(
        forward,
        (x, w),
        arranged=lambda gradients: (gradients[0], gradients[1][index]),
        answers=((x, w.detach()[index], places), inexact),
    )


def _on_a_gpu(rate: float, *args: Any, **kwargs: Any) -> Loss:
    if args[0].device.type != "cuda":
        raise Unavailable("it is measured on GPUs")
    return head(rate, *args, **kwargs)


PEER = Implementation(
    "PartialFC",
    {"margin_softmax_loss": functools.partial(_on_a_gpu, 1.0)},
    note="insightface's steps; its gradient is that without the margin",
)
TENTH = Implementation(
    "PartialFC 0.1",
    {"margin_softmax_loss": functools.partial(_on_a_gpu, 0.1)},
    note="the same over a sample of a tenth of the classes",
)
