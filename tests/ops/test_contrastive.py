"""The contrastive losses against their papers' formulas written pair by pair, and their edges."""

import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastzoo import ops
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.contrastive import random_pairs
from fastzoo.testing.gradients import assert_gradient_close
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE

BACKENDS = [
    b
    for b in ("reference", "cpu", "cuda", "triton")
    if OPERATORS["contrastive"].refusal(b, DEVICE) is None
]


def pairs(n: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    image, text = (t.double().to(DEVICE) for t in random_pairs(n, dim, seed=seed))
    return image.requires_grad_(), text.requires_grad_()


def assert_same_with_gradients(loss: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    grads = torch.autograd.grad(loss, inputs, retain_graph=True)
    for a, e in zip(grads, torch.autograd.grad(expected, inputs, retain_graph=True), strict=True):
        assert_gradient_close(a, e, rtol=1e-10)


# The papers' sums, one pair after the other.


def paper_nce(q: Tensor, k: Tensor, positives: list[int], temperature: Any) -> Tensor:
    def score(i: int, j: int) -> Tensor:
        return (q[i] @ k[j] / temperature).exp()

    return torch.stack(
        [
            -(score(i, p) / sum(score(i, j) for j in range(len(k)))).log()
            for i, p in enumerate(positives)
        ]
    ).mean()


def paper_siglip(image: Tensor, text: Tensor, scale: Any, bias: Any) -> Tensor:
    total = image.new_zeros(())
    for i, j in itertools.product(range(len(image)), range(len(text))):
        sign = 1 if i == j else -1
        total = total - (1 / (1 + (-sign * (scale * image[i] @ text[j] + bias)).exp())).log()
    return total / len(image)


def paper_simclr(z: Tensor, temperature: Any) -> Tensor:
    n = len(z)
    losses = []
    for i in range(n):
        similar = F.cosine_similarity(z[i : i + 1], z) / temperature
        others = torch.arange(n, device=z.device) != i
        losses.append(-similar[(i + n // 2) % n] + similar[others].exp().sum().log())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("backend", BACKENDS)
def test_like_the_papers(backend: str) -> None:
    image, text = pairs(11, 5)
    scale = torch.tensor(7.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    own = list(range(11))
    both = [image, text, scale]
    by_image = paper_nce(image, text, own, 1 / scale)
    by_text = paper_nce(text, image, own, 1 / scale)
    clip = ops.clip_loss(image, text, scale, backend=backend)
    assert_same_with_gradients(clip, (by_image + by_text) / 2, both)
    nce = ops.info_nce(image, text, temperature=1 / scale, backend=backend)
    assert_same_with_gradients(nce, by_image, both)
    symmetric = ops.info_nce(image, text, temperature=1 / scale, symmetric=True, backend=backend)
    assert_same_with_gradients(symmetric, (by_image + by_text) / 2, both)
    siglip = ops.sigmoid_contrastive_loss(image, text, scale, bias, backend=backend)
    assert_same_with_gradients(siglip, paper_siglip(image, text, scale, bias), [*both, bias])
    z = torch.cat([image, 3 * text])[:-2]
    simclr = ops.nt_xent(z, 1 / scale, backend=backend)
    assert_same_with_gradients(simclr, paper_simclr(z, 1 / scale), both)


@pytest.mark.parametrize("backend", BACKENDS)
def test_positives_and_queue(backend: str) -> None:
    q, _ = pairs(9, 4, seed=1)
    k, _ = pairs(14, 4, seed=2)
    positives = torch.randperm(14, generator=torch.Generator().manual_seed(0))[:9].to(DEVICE)
    loss = ops.info_nce(q, k, temperature=0.2, positives=positives, backend=backend)
    assert_same_with_gradients(loss, paper_nce(q, k, positives.tolist(), 0.2), [q, k])
    queue, _ = pairs(20, 4, seed=3)
    moco = ops.info_nce(q, k, temperature=0.2, queue=queue, backend=backend)
    expected = torch.stack(
        [paper_nce(q[i : i + 1], torch.cat([k[i : i + 1], queue]), [0], 0.2) for i in range(9)]
    ).mean()
    assert_same_with_gradients(moco, expected, [q, k, queue])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [-10.0, -17.0, -30.0])
def test_unlikely_pairs_count(bias: float, backend: str) -> None:
    """Each term of SigLIP's sum is near exp(z), below what 1 + exp(z) resolves in float32. Scores
    of up to |bias| + 1 move it by that many of (16 + 8) 2^-24, the sum of 48 by 48 * 2^-24."""
    q, k = (t.to(DEVICE) for t in random_pairs(48, 16))
    one, shift = torch.ones(1, device=DEVICE), torch.full((1,), bias, device=DEVICE)
    nowhere = torch.full((48,), -1, device=DEVICE)
    operator = OPERATORS["contrastive"].choose(backend, DEVICE)
    _, row, _ = operator(q, k, nowhere, one, shift, False, False, True, False)
    expected = F.softplus(q.double() @ k.double().t() + bias, threshold=100.0).sum(1)
    rtol = ((1 - bias) * 24 + 48) * 2.0**-24
    torch.testing.assert_close(row.double(), expected, rtol=rtol, atol=0)


def test_a_bias_shifts_no_softmax() -> None:
    image, text = pairs(11, 5)
    bias = torch.tensor(40.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    plain = ops.clip_loss(image, text, 7.0)
    shifted = ops.clip_loss(image, text, 7.0, bias)
    torch.testing.assert_close(shifted, plain, rtol=1e-12, atol=1e-13)
    assert torch.autograd.grad(shifted, bias)[0].abs() < 1e-14


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_scores_of_100(dtype: torch.dtype, backend: str) -> None:
    """Scores of either sign, 200 apart, in a row and in a column: nothing overflows or vanishes."""
    generator = torch.Generator().manual_seed(0)
    signs = (torch.randint(0, 2, (2, 24, 1), generator=generator) * 2 - 1).to(dtype)
    q, k = (signs.to(DEVICE) * torch.ones(1, 4, device=DEVICE, dtype=dtype)).unbind()
    leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    for name in ("clip_loss", "sigmoid_contrastive_loss"):
        function = getattr(ops, name)
        loss = function(*leaves, 25.0, backend=backend)
        expected = function(*wide, 25.0, backend="reference")
        torch.testing.assert_close(loss.double(), expected, rtol=2.0**-20, atol=0)
        for grad, e in zip(
            torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, wide), strict=True
        ):
            assert_gradient_close(grad, e, rtol=2.0**-7 if dtype == torch.bfloat16 else 2.0**-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_instruction_set(dtype: torch.dtype, capability: str) -> None:
    """Sizes around tiles and chunks, on each instruction set of the C++ kernels."""
    unit = 2.0**-52 if dtype == torch.float64 else 2.0**-23
    coarse = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(dtype, 0.0)
    for n, dim in [(400, 33), (193, 100), (31, 8), (1, 5)]:
        leaves = [t.to(dtype).requires_grad_() for t in random_pairs(n, dim, seed=n)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        for name in ("clip_loss", "sigmoid_contrastive_loss"):
            function = getattr(ops, name)
            loss = function(*leaves, 10.0, -1.0, backend="cpu")
            expected = function(*wide, 10.0, -1.0, backend="reference")
            score = 11 * (dim + 8) * unit
            rows = n if name == "sigmoid_contrastive_loss" else 1
            torch.testing.assert_close(
                loss.double(), expected, rtol=0, atol=rows * (4 * score + (n + 16) * unit)
            )
            for a, e in zip(
                torch.autograd.grad(loss, leaves),
                torch.autograd.grad(expected, wide),
                strict=True,
            ):
                # The terms that cancel, of 10 / n each; for one pair alone they leave nothing.
                rtol = 8 * score + 2 * n * unit + coarse
                assert_gradient_close(a, e, rtol=rtol, cancelled=2 * 10 / n)


def test_no_scores_in_memory() -> None:
    n, dim = 6000, 32
    leaves = [t.requires_grad_() for t in random_pairs(n, dim, device=DEVICE)]

    def step() -> None:
        torch.autograd.grad(ops.clip_loss(*leaves, 10.0), leaves)

    step()
    assert peak_memory(step, DEVICE) < n * n * 4 // 4


def test_compiled_whole_with_its_gradient() -> None:
    image, text = pairs(11, 5)

    def loss(image: Tensor, text: Tensor) -> Tensor:
        return ops.clip_loss(image, text, 10.0) + ops.nt_xent(torch.cat([image, text]), 0.5)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same_with_gradients(compiled(image, text), loss(image, text), [image, text])


def test_errors_name_the_argument() -> None:
    image, text = random_pairs(5, 3)
    with pytest.raises(ValueError, match="even number"):
        ops.nt_xent(image, 0.5)
    with pytest.raises(ValueError, match="k: expected at least 5"):
        ops.info_nce(image, text[:4], temperature=0.1)
    with pytest.raises(ValueError, match="symmetric"):
        ops.info_nce(image, text, temperature=0.1, queue=text, symmetric=True)
    with pytest.raises(ValueError, match="positives"):
        ops.info_nce(image, text, temperature=0.1, positives=torch.zeros(3, dtype=torch.long))
    with pytest.raises(RuntimeError, match="positive"):
        ops.info_nce(
            image, text, temperature=0.1, positives=torch.tensor([0, 1, 9, 3, 4]), backend="cpu"
        )
    assert math.isclose(float(ops.clip_loss(image[:1], text[:1], 3.0)), 0, abs_tol=1e-6)
