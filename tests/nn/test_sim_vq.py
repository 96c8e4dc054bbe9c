"""SimVQ against the formula in float64, and against lucidrains' class."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn import SimVQ

DIM, CODES = 6, 11


def latents(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def quantizer_of(**options: Any) -> SimVQ:
    torch.manual_seed(0)
    return SimVQ(DIM, CODES, **options).double()


def turned(x: Tensor, code: Tensor) -> Tensor:
    """x turned and scaled into its code, by a matrix that has no gradient."""
    fixed = x.detach()
    u, v = fixed / fixed.norm(), code / code.norm()
    w = (u + v) / (u + v).norm()
    eye = torch.eye(len(x), dtype=x.dtype)
    matrix = eye - 2 * torch.outer(w, w) + 2 * torch.outer(v, u)
    return code.norm() / fixed.norm() * matrix @ x


@pytest.mark.parametrize("rotation", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_to_quantize_commit_loss_weight": 2.0, "commitment_weight": 0.3},
        {"codebook_transform": nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, DIM)),
         "frozen_codebook_dim": 4},
    ],
    ids=["defaults", "weights", "transform"],
)  # fmt: skip
def test_values_and_gradients_are_the_definition(options: dict[str, Any], rotation: bool) -> None:
    quantizer = quantizer_of(rotation_trick=rotation, **options)
    x = latents(40, DIM).requires_grad_()
    quantized, indices, loss = quantizer(x)

    codebook = quantizer.code_transform(quantizer.frozen_codebook)
    right = (x[:, None] - codebook).square().sum(-1).argmin(-1)
    code = codebook[right]
    commit = options.get("input_to_quantize_commit_loss_weight", 0.25)
    wanted = F.mse_loss(code, x.detach()) + commit * F.mse_loss(x, code.detach())
    wanted = options.get("commitment_weight", 1.0) * wanted
    fixed = code.detach()
    expected = x + (fixed - x).detach()
    if rotation:
        expected = torch.stack([turned(*pair) for pair in zip(x, fixed, strict=True)])

    assert torch.equal(indices, right)
    assert len(indices.unique()) > 5
    assert torch.equal(quantized, code), "the code itself"
    # Float64, in another order.
    close = {"rtol": 1e-10, "atol": 1e-12}
    torch.testing.assert_close(quantized, expected, **close)
    torch.testing.assert_close(loss, wanted, **close)
    grad, inputs = latents(40, DIM, seed=1), [x, *quantizer.parameters()]
    mine = torch.autograd.grad((quantized * grad).sum() + loss, inputs)
    theirs = torch.autograd.grad((expected * grad).sum() + wanted, inputs)
    torch.testing.assert_close(mine, theirs, **close)
    assert all(bool(g.any()) for g in mine)


@pytest.mark.parametrize(
    ("channel_first", "shape", "indices_shape"),
    [
        (False, (7, DIM), (7,)),
        (False, (DIM,), ()),
        (False, (2, 3, 4, DIM), (2, 3, 4)),
        (True, (2, DIM, 5), (2, 5)),
        (True, (2, DIM, 3, 4), (2, 3, 4)),
        (True, (2, DIM), (2,)),
        (False, (0, DIM), (0,)),
    ],
)
def test_layouts(
    channel_first: bool, shape: tuple[int, ...], indices_shape: tuple[int, ...]
) -> None:
    quantizer = quantizer_of(channel_first=channel_first)
    x = latents(*shape)
    quantized, indices, _ = quantizer(x)
    assert (quantized.shape, indices.shape) == (x.shape, indices_shape)
    rows = x.movedim(1, -1) if channel_first else x
    assert torch.equal(quantizer_of()(rows)[1], indices)
    torch.testing.assert_close(quantizer.indices_to_codes(indices), quantized)


@pytest.mark.parametrize(
    "options",
    [{}, {"rotation_trick": False, "channel_first": True, "frozen_codebook_dim": 3}],
    ids=["defaults", "others"],
)
def test_agrees_with_lucidrains(options: dict[str, Any]) -> None:
    peer = pytest.importorskip("vector_quantize_pytorch")
    theirs, ours = peer.SimVQ(DIM, CODES, **options).double(), quantizer_of(**options)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = latents(2, DIM, DIM).requires_grad_()
    found, expected = ours(x), theirs(x)
    close = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(found, expected, **close)
    codes = ours.indices_to_codes(found[1])
    torch.testing.assert_close(codes, theirs.indices_to_codes(found[1]), **close)
    grad = latents(2, DIM, DIM, seed=1)
    mine, right = (
        torch.autograd.grad((q * grad).sum() + loss, [x, *quantizer.parameters()])
        for quantizer, (q, _, loss) in ((ours, found), (theirs, expected))
    )
    torch.testing.assert_close(mine, right, **close)


def test_init_fn_and_frozen_codebook() -> None:
    quantizer = quantizer_of(init_fn=lambda codes: codes.sign())
    assert quantizer.frozen_codebook.unique().tolist() == [-1, 1]
    assert [name for name, _ in quantizer.named_parameters()] == ["code_transform.weight"]
    assert set(quantizer.state_dict()) == {"frozen_codebook", "code_transform.weight"}
    big = SimVQ(16, 4096, frozen_codebook_dim=25).frozen_codebook
    assert big.std().item() == pytest.approx(0.2, rel=0.02)


def test_autocast() -> None:
    quantizer = quantizer_of().float()
    x = latents(20, DIM).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        quantized, _, loss = quantizer(x)
        codebook = quantizer.codebook
    assert codebook.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    assert torch.equal(quantized, quantized.bfloat16().float()), "a code"


def test_fullgraph_compile() -> None:
    quantizer = quantizer_of(channel_first=True)
    x = latents(2, DIM, 5).requires_grad_()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, quantizer):
        quantized, indices, loss = call(x)
        weight = quantizer.code_transform.weight
        results.append((indices, *torch.autograd.grad(quantized.sum() + loss, [x, weight])))
    torch.testing.assert_close(results[0], results[1])


def test_bad_arguments() -> None:
    for sizes in ({"dim": 0}, {"codebook_size": 0}, {"frozen_codebook_dim": 0}):
        with pytest.raises(ValueError, match=next(iter(sizes))):
            SimVQ(**{"dim": 4, "codebook_size": 4, **sizes})
    with pytest.raises(ValueError, match=r"x: expected \[..., D\], D = 6, got \[2, 5\]"):
        quantizer_of()(latents(2, 5))
    with pytest.raises(ValueError, match=r"x: expected \[B, D, ...\]"):
        quantizer_of(channel_first=True)(latents(2, 5, 6))
    with pytest.raises(TypeError, match="x"):
        quantizer_of()(torch.zeros(2, 6, dtype=torch.int64))
