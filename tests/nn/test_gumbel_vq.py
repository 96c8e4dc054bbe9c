"""GumbelVQ against the published formulas written out in float64, with the same noise."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastzoo.nn import GumbelVQ

HIDDEN, DIM, CODES = 6, 5, 9
USED = [7, 2, 4, 0]


def quantizer_of(**options: Any) -> GumbelVQ:
    torch.manual_seed(0)
    return GumbelVQ(HIDDEN, DIM, CODES, **options).double()


def latents() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, HIDDEN, 3, 4, generator=generator, dtype=torch.float64)


def definition(
    quantizer: GumbelVQ, z: Tensor, temp: float, hard: bool, codes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantised, divergence and index of the latents' vectors, in turn."""
    weight, bias = quantizer.proj.weight[codes, :, 0, 0], quantizer.proj.bias
    assert bias is not None
    rows = z.movedim(1, -1).reshape(-1, HIDDEN)
    logits = rows @ weight.T + bias[codes]
    torch.manual_seed(5)
    shape = (2, len(codes), 3, 4)
    noise = -torch.empty(shape, dtype=torch.float64).exponential_().log()
    noisy = logits + noise.movedim(1, -1).reshape(-1, len(codes))
    y = torch.softmax(noisy / temp, -1)
    index = y.argmax(-1)
    if hard:
        y = torch.eye(len(codes)).double()[index] + y - y.detach()
    p = torch.softmax(logits, -1)
    divergence = (p * (p * CODES).log()).sum(-1).mean()
    return y @ quantizer.embed.weight[codes], divergence, index


@pytest.mark.parametrize("remap", [None, USED], ids=["all", "used"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("straight_through", [True, False])
def test_values_and_gradients_are_the_definition(
    straight_through: bool, training: bool, remap: list[int] | None
) -> None:
    options = {} if remap is None else {"remap": torch.tensor(remap)}
    quantizer = quantizer_of(straight_through=straight_through, kl_weight=0.3, **options)
    quantizer.train(training)
    quantizer.temperature = 0.8
    z = latents().requires_grad_()
    torch.manual_seed(5)
    z_q, diff, (nothing, neither, indices) = quantizer(z)
    assert nothing is neither is None
    assert (z_q.shape, indices.shape, indices.dtype) == ((2, DIM, 3, 4), (2, 3, 4), torch.int64)
    codes = remap or list(range(CODES))
    hard = straight_through or not training
    expected, divergence, right = definition(quantizer, z, 0.8, hard, codes)
    # Float64, in another order.
    close = {"rtol": 1e-11, "atol": 1e-13}
    torch.testing.assert_close(z_q.movedim(1, -1).reshape(-1, DIM), expected, **close)
    torch.testing.assert_close(diff, 0.3 * divergence, **close)
    assert torch.equal(indices.flatten(), right)
    inputs = [z, *quantizer.parameters()]
    grad = torch.randn(2 * 3 * 4, DIM, dtype=torch.float64)
    found = (z_q.movedim(1, -1).reshape(-1, DIM) * grad).sum() + diff
    mine = torch.autograd.grad(found, inputs)
    wanted = torch.autograd.grad((expected * grad).sum() + 0.3 * divergence, inputs)
    torch.testing.assert_close(mine, wanted, **close)


def test_codes_that_are_impossible_add_nothing_to_the_loss() -> None:
    quantizer = quantizer_of(kl_weight=1.0)
    assert quantizer.proj.bias is not None
    with torch.no_grad():
        quantizer.proj.weight.zero_()
        quantizer.proj.bias.copy_(torch.tensor([0.0] + [-1e4] * (CODES - 1)))
    z = latents().requires_grad_()
    _, diff, (_, _, indices) = quantizer(z)
    assert diff.item() == pytest.approx(math.log(CODES), rel=1e-15)
    assert not indices.any()
    assert bool(torch.autograd.grad(diff, quantizer.proj.bias)[0].isfinite().all())


def test_interfaces() -> None:
    quantizer = quantizer_of(use_vqinterface=False)
    z = latents()
    z_q, _, indices = quantizer(z)
    assert indices.shape == (2, 3, 4)
    torch.testing.assert_close(quantizer.get_codebook_entry(indices.flatten(), (2, 3, 4, DIM)), z_q)
    quantizer = quantizer_of(remap=torch.tensor(USED))
    z_q, _, (_, _, indices), logits = quantizer(z, temp=2.0, return_logits=True)
    assert torch.equal(logits, quantizer.proj(z)[:, USED])
    torch.testing.assert_close(quantizer.get_codebook_entry(indices.flatten(), (2, 3, 4, DIM)), z_q)
    assert set(quantizer.state_dict()) == {"used", "proj.weight", "proj.bias", "embed.weight"}


@pytest.mark.parametrize("unknown", ["random", "extra", 2])
def test_remapping(unknown: str | int, tmp_path: Path) -> None:
    np.save(tmp_path / "used.npy", np.array(USED, dtype=np.int32))
    quantizer = quantizer_of(remap=str(tmp_path / "used.npy"), unknown_index=unknown)
    assert quantizer.re_embed == 4 + (unknown == "extra")
    every = torch.arange(CODES).repeat(200, 1)
    found = quantizer.remap_to_used(every)
    known = [code in USED for code in range(CODES)]
    assert found[0, known].tolist() == [3, 1, 2, 0]
    others = found[:, [not k for k in known]]
    if unknown == "random":
        # Each of 1 000 draws from four: none stays away.
        assert others.unique().tolist() == [0, 1, 2, 3]
    else:
        assert others.unique().tolist() == [quantizer.unknown_index] == [4 if unknown != 2 else 2]
    kept = found.clone()
    back = quantizer.unmap_to_all(found)
    assert torch.equal(back[:, known], every[:, known])
    if unknown == "extra":
        assert bool((back[:, [not k for k in known]] == USED[0]).all())
    assert torch.equal(found, kept), "indices are not changed in place"


def test_fullgraph_compile() -> None:
    quantizer = quantizer_of(remap=torch.tensor(USED))
    z = latents()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, quantizer):
        torch.manual_seed(2)
        z_q, diff, (_, _, indices) = call(z)
        results.append((z_q, diff, indices))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embed": 0}, "n_embed"),
        ({"remap": torch.tensor([1, 1])}, "remap: expected different indices below 9"),
        ({"remap": torch.tensor([1, 9])}, "remap"),
        ({"remap": torch.tensor([-1])}, "remap"),
        ({"remap": torch.tensor([])}, "remap"),
        ({"remap": torch.tensor([1]), "unknown_index": "zero"}, "unknown_index"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    sizes = {"num_hiddens": HIDDEN, "embedding_dim": DIM, "n_embed": CODES}
    with pytest.raises(ValueError, match=message):
        GumbelVQ(**{**sizes, **options})


def test_bad_tensors() -> None:
    quantizer = quantizer_of()
    with pytest.raises(ValueError, match="z: expected"):
        quantizer(torch.zeros(2, 5, 3, 4))
    with pytest.raises(ValueError, match="z: expected"):
        quantizer(torch.zeros(2, HIDDEN, 3))
    with pytest.raises(ValueError, match="temp"):
        quantizer(latents(), temp=0.0)
    with pytest.raises(RuntimeError, match="remap"):
        quantizer.remap_to_used(torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="indices: expected 24"):
        quantizer.get_codebook_entry(torch.zeros(3, dtype=torch.int64), (2, 3, 4, DIM))
