"""LFQ against the softmax over all codes in float64, and against lucidrains' class."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn import LFQ, lfq
from fastzoo.testing.timing import peak_memory
from tests.conftest import DEVICE


def latents(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def all_codes(bits: int, magnitude: float) -> Tensor:
    rows = [[magnitude if i >> b & 1 else -magnitude for b in reversed(range(bits))]
            for i in range(2**bits)]  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def entropies(x: Tensor, magnitude: float, inv_temperature: float) -> tuple[Tensor, Tensor]:
    """As the paper has them, of ``x [N, C, d]``, with an N x C x 2^d tensor."""
    codebook = all_codes(x.shape[-1], magnitude)
    log_p = (2 * inv_temperature * x @ codebook.T).log_softmax(-1)
    per_sample = -(log_p.exp() * log_p).sum(-1).mean()
    mean = log_p.exp().mean(0)
    # What underflows has the entropy 0 and no gradient.
    return per_sample, -(mean * mean.clamp_min(1e-300).log()).sum(-1).mean()


@pytest.mark.parametrize("inv_temperature", [0.05, 1.0, 10.0])
@pytest.mark.parametrize(
    ("bits", "options"),
    [
        (1, {}),
        (5, {"diversity_gamma": 0.3}),
        (6, {"spherical": True, "commitment_loss_weight": 0.25}),
        (4, {"num_codebooks": 3, "commitment_loss_weight": 2.0, "codebook_scale": 0.5}),
        (3, {"num_codebooks": 2, "spherical": True, "codebook_scale": 2.0}),
        (3, {"soft_clamp_input_value": 1.5, "straight_through_activation": nn.Tanh()}),
    ],
    ids=str,
)
def test_losses_and_gradients_are_the_definition(
    bits: int, options: dict[str, Any], inv_temperature: float
) -> None:
    quantizer = LFQ(codebook_size=2**bits, entropy_loss_weight=0.7, **options)
    codebooks, scale = quantizer.num_codebooks, options.get("codebook_scale", 1.0)
    x = latents(2, 20, bits * codebooks).requires_grad_()
    output, losses = quantizer(x, inv_temperature, return_loss_breakdown=True)

    y = x.reshape(-1, codebooks, bits)
    if clamp := options.get("soft_clamp_input_value"):
        y = (y / clamp).tanh() * clamp
    magnitude = scale
    if options.get("spherical"):
        y = scale * y / y.norm(dim=-1, keepdim=True)
        magnitude = scale / math.sqrt(bits)
    codes = magnitude * y.detach().sign()
    per_sample, batch = entropies(y, magnitude, inv_temperature)
    commitment = (y - codes).square().mean()
    # Float64, in another order.
    close = {"rtol": 1e-11, "atol": 1e-12}
    torch.testing.assert_close(tuple(losses), (per_sample, batch, commitment), **close)
    loss = 0.7 * (per_sample - options.get("diversity_gamma", 1.0) * batch)
    loss = loss + options.get("commitment_loss_weight", 0.0) * commitment
    torch.testing.assert_close(output.entropy_aux_loss, loss, **close)
    torch.testing.assert_close(output.quantized.reshape(y.shape), codes, rtol=1e-15, atol=0)
    table = all_codes(bits, magnitude)
    assert torch.equal(
        table[output.indices.reshape(-1, codebooks)] > 0, output.quantized.reshape(y.shape) > 0
    )
    soft = y.tanh() if "straight_through_activation" in options else y
    grad = latents(*y.shape, seed=1)
    mine = torch.autograd.grad(
        output.entropy_aux_loss + (output.quantized.reshape(y.shape) * grad).sum(), x
    )
    right = torch.autograd.grad(loss + (soft * grad).sum(), x)
    torch.testing.assert_close(mine, right, **close)


def test_bits_that_are_nearly_certain_keep_their_entropy() -> None:
    logits = torch.tensor([-700.0, -300, -40, -1, -1e-6, 0, 1e-6, 1, 40, 300, 700]).double()
    a = logits.abs()
    # For a >= 0, with positive terms alone: log(1 + e^-a) + a e^-a / (1 + e^-a).
    expected = [math.log1p(math.exp(-v)) + v / (math.exp(v) + 1) for v in a.tolist()]
    found = lfq.bit_entropies(logits.requires_grad_())
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0
    )
    (grad,) = torch.autograd.grad(found.sum(), logits)
    slopes = [-v / (2 + 2 * math.cosh(v)) for v in logits.tolist()]
    torch.testing.assert_close(
        grad, torch.tensor(slopes, dtype=torch.float64), rtol=1e-13, atol=2e-16
    )


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3, 1e9])
def test_float32_stays_finite_and_close(scale: float) -> None:
    quantizer = LFQ(dim=8)
    x = (latents(64, 8) * scale).float().requires_grad_()
    output, losses = quantizer(x, return_loss_breakdown=True)
    (grad,) = torch.autograd.grad(output.entropy_aux_loss, x)
    exact = x.detach().double().requires_grad_()
    right = entropies(exact[:, None], 1.0, 100.0)
    (expected,) = torch.autograd.grad(0.1 * (right[0] - right[1]), exact)
    assert torch.equal(output.quantized, x.sign()), "to the last bit"
    # Rounding of 64 x 8 terms in float32; derivatives by x have the factor 4 * 100.
    torch.testing.assert_close(losses[0].double(), right[0], rtol=1e-5, atol=1e-30)
    torch.testing.assert_close(losses[1].double(), right[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=4e-4 * 0.1 / 64)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    logits = latents(29, 2, bits).requires_grad_()
    weight = (torch.arange(29) % 3 > 0).double()
    grad = latents(2, 2**bits, seed=1)
    whole = lfq.sum_of_distributions(logits, weight)
    (expected,) = torch.autograd.grad(whole, logits, grad)
    monkeypatch.setattr(lfq, "CHUNK", 2 * 2 ** ((bits + 1) // 2) * 4)
    chunked = lfq.sum_of_distributions(logits, weight)
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-15)
    (found,) = torch.autograd.grad(chunked, logits, grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("bits", [1, 3, 4])
def test_derivatives_of_the_mean_distribution(bits: int) -> None:
    logits = latents(3, 2, bits).requires_grad_()
    weight = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)

    def call(logits: Tensor) -> Tensor:
        return lfq.sum_of_distributions(logits, weight)

    assert torch.autograd.gradcheck(call, logits)
    assert torch.autograd.gradgradcheck(call, logits)


def test_no_matrix_of_vectors_and_codes() -> None:
    n, size = 16384, 2**18
    quantizer = LFQ(codebook_size=size).to(DEVICE)
    x = latents(n, 18).float().to(DEVICE).requires_grad_()

    def step() -> None:
        quantizer(x).entropy_aux_loss.backward()

    # Six tensors of all codes and six chunks are 30 MB, and about twenty tensors are like x. One
    # N x K matrix is 17 GB; without chunks, halves of the bits would be 33 MB each.
    assert peak_memory(step, DEVICE) < 6 * 4 * size + 6 * (4 << 20) + 40 * n * 18 * 4
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())


def test_codes_without_number() -> None:
    quantizer = LFQ(codebook_size=2**48, entropy_loss_weight=0.0, commitment_loss_weight=1.0)
    x = latents(5, 48).requires_grad_()
    output = quantizer(x)
    torch.testing.assert_close(output.entropy_aux_loss, (x - x.sign()).square().mean())
    expected = [int("".join("1" if v > 0 else "0" for v in row), 2) for row in x.tolist()]
    assert output.indices.tolist() == expected
    assert torch.equal(quantizer.indices_to_codes(output.indices).double(), x.sign())


def test_mask_leaves_vectors_out() -> None:
    quantizer = LFQ(dim=5, commitment_loss_weight=0.5)
    x = latents(3, 10, 5).requires_grad_()
    mask = torch.arange(30).reshape(3, 10) % 3 > 0
    output, losses = quantizer(x, 2.0, True, mask)
    alone, expected = quantizer(x[mask], 2.0, True)
    torch.testing.assert_close(tuple(losses), tuple(expected), rtol=1e-12, atol=0)
    (grad,) = torch.autograd.grad(output.entropy_aux_loss, x)
    (right,) = torch.autograd.grad(alone.entropy_aux_loss, x)
    torch.testing.assert_close(grad, right, rtol=1e-10, atol=1e-14)
    assert torch.equal(output.indices, quantizer(x).indices)
    image = x.detach().movedim(-1, 1).unflatten(-1, (2, 5))
    for shape in ((3, 2, 5), (3, 10)):
        found = quantizer(image, 2.0, mask=mask.reshape(shape)).entropy_aux_loss
        torch.testing.assert_close(found, output.entropy_aux_loss, rtol=1e-12, atol=0)
    nothing = quantizer(x, 2.0, mask=torch.zeros_like(mask)).entropy_aux_loss
    assert nothing == 0
    assert quantizer(x[:0]).entropy_aux_loss == 0


def test_evaluation_gives_codes_alone() -> None:
    quantizer = LFQ(dim=4, commitment_loss_weight=1.0)
    x = latents(7, 4).float().requires_grad_()
    trained = quantizer(x)
    quantizer.eval()
    output, losses = quantizer(x, return_loss_breakdown=True)
    assert torch.equal(output.quantized, trained.quantized)
    assert torch.equal(output.indices, trained.indices)
    assert not output.quantized.requires_grad
    assert [v.item() for v in (output.entropy_aux_loss, *losses)] == [0] * 4


@pytest.mark.parametrize(
    ("options", "shape", "indices_shape"),
    [
        ({}, (7, 4), (7,)),
        ({}, (2, 3, 4), (2, 3)),
        ({}, (2, 4, 3, 5), (2, 3, 5)),
        ({"channel_first": False}, (2, 3, 5, 4), (2, 3, 5)),
        ({"channel_first": True}, (2, 4, 3), (2, 3)),
        ({"keep_num_codebooks_dim": True}, (2, 3, 4), (2, 3, 1)),
        ({"num_codebooks": 2, "dim": 6}, (2, 6, 5, 3), (2, 5, 3, 2)),
        ({"has_projections": True}, (2, 3, 4), (2, 3)),
        ({"spherical": True}, (2, 3, 4), (2, 3)),
    ],
)
def test_layouts(
    options: dict[str, Any], shape: tuple[int, ...], indices_shape: tuple[int, ...]
) -> None:
    quantizer = LFQ(codebook_size=16, **options)
    x = latents(*shape).float()
    output = quantizer(x)
    assert (output.quantized.shape, output.quantized.dtype) == (x.shape, x.dtype)
    assert output.indices.shape == indices_shape
    torch.testing.assert_close(quantizer.indices_to_codes(output.indices), output.quantized)
    codes = quantizer.indices_to_codes(output.indices, project_out=False)
    width = 4 * quantizer.num_codebooks
    assert width == codes.shape[1 if quantizer._channels_second(len(shape)) else -1]
    assert torch.equal(quantizer.codebook, quantizer._codes_of(torch.arange(16)))


# Theirs raises probabilities to 1e-5 within logarithms; here none is as small.
CASES: list[dict[str, Any]] = [
    {"dim": 5},
    {"dim": 9, "codebook_size": 16, "num_codebooks": 2, "commitment_loss_weight": 0.5},
    {"dim": 5, "spherical": True, "codebook_scale": 2.0, "diversity_gamma": 2.0},
    {"dim": 4, "soft_clamp_input_value": 1.5, "straight_through_activation": nn.Tanh()},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_agrees_with_lucidrains(options: dict[str, Any]) -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    theirs, ours = peer.LFQ(**options), LFQ(**options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = (latents(2, 30, ours.dim) / 2).float().requires_grad_()
    expected, right = theirs(x, 1.0, True)
    found, losses = ours(x, 1.0, True)
    assert found._fields == expected._fields
    assert losses._fields == right._fields
    # Float32; their commitment is 0 where its weight is.
    torch.testing.assert_close(found.quantized, expected.quantized, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(tuple(losses)[:2], tuple(right)[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        found.entropy_aux_loss, expected.entropy_aux_loss, rtol=1e-4, atol=1e-6
    )
    torch.testing.assert_close(
        ours.indices_to_codes(found.indices), theirs.indices_to_codes(expected.indices)
    )
    grad = torch.randn_like(x)
    for mine, wanted in zip(
        torch.autograd.grad(
            found.entropy_aux_loss + (found.quantized * grad).sum(), [x, *ours.parameters()]
        ),
        torch.autograd.grad(
            expected.entropy_aux_loss + (expected.quantized * grad).sum(),
            [x, *theirs.parameters()],
        ),
        strict=True,
    ):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_compute_in_float32(dtype: torch.dtype) -> None:
    quantizer = LFQ(dim=6)
    x = latents(50, 6).to(dtype).requires_grad_()
    expected = quantizer(x.detach().float())
    with torch.autocast("cpu", torch.bfloat16):
        found = quantizer(x)
        (grad,) = torch.autograd.grad(found.entropy_aux_loss, x)
    assert found.quantized.dtype == dtype
    assert torch.equal(found.quantized.float(), expected.quantized)
    assert torch.equal(found.entropy_aux_loss, expected.entropy_aux_loss)
    (right,) = torch.autograd.grad(quantizer(x).entropy_aux_loss, x)
    assert torch.equal(grad, right)


def test_zero_is_negative_and_so_is_nan() -> None:
    output = LFQ(dim=4).eval()(torch.tensor([[0.0, -0.0, torch.nan, 1.0]]))
    assert output.quantized.tolist() == [[-1, -1, -1, 1]]
    assert output.indices.tolist() == [1]


def test_fullgraph_compile() -> None:
    quantizer = LFQ(codebook_size=16, dim=5, commitment_loss_weight=0.5).double()
    x = latents(8, 5)
    mask = torch.arange(8) > 2
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (compiled, quantizer):
        output = call(x, 3.0, mask=mask)
        quantizer.zero_grad()
        (output.entropy_aux_loss + output.quantized.sum()).backward()
        grads.append((*output, quantizer.project_in.weight.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-13)


def test_functional_gradient() -> None:
    quantizer = LFQ(dim=4)
    x = latents(6, 4).requires_grad_()
    (expected,) = torch.autograd.grad(quantizer(x).entropy_aux_loss, x)
    found = torch.func.grad(lambda t: quantizer(t).entropy_aux_loss)(x.detach())
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dim, codebook_size"),
        ({"codebook_size": 12}, "codebook_size: expected a power of 2"),
        ({"codebook_size": 1}, "codebook_size"),
        ({"codebook_size": 2**63}, "codebook_size"),
        ({"dim": 4, "codebook_scale": 0.0}, "codebook_scale"),
        ({"dim": 4, "soft_clamp_input_value": 0.5}, "soft_clamp_input_value"),
        ({"dim": 4, "num_codebooks": 2, "keep_num_codebooks_dim": False}, "keep_num_codebooks"),
        ({"dim": 4, "codebook_size": 8, "has_projections": False}, "has_projections"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LFQ(**options)


def test_bad_tensors() -> None:
    quantizer = LFQ(dim=4)
    with pytest.raises(TypeError, match="frac_per_sample_entropy"):
        LFQ(dim=4, frac_per_sample_entropy=0.5)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=r"x: expected \[..., D\], D = 4"):
        quantizer(torch.zeros(2, 3))
    with pytest.raises(TypeError, match="x"):
        quantizer([1.0])
    x = torch.zeros(2, 3, 4)
    with pytest.raises(TypeError, match="mask: expected bool"):
        quantizer(x, mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"mask: expected \[2, 3\], got \[3, 2\]"):
        quantizer(x, mask=torch.zeros(3, 2, dtype=torch.bool))


def test_the_oracle_is_a_distribution() -> None:
    x = latents(3, 1, 3)
    log_p = (2 * x @ all_codes(3, 1.0).T).log_softmax(-1)
    distances = (x[:, 0, None] - all_codes(3, 1.0)).square().sum(-1)
    torch.testing.assert_close(log_p[:, 0], F.log_softmax(-distances, -1))
