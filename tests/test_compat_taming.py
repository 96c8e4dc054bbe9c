"""taming-transformers' quantisers against what they publish, written out in float64."""

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from fastzoo.compat import taming
from fastzoo.ops._operator import OPERATORS
from fastzoo.testing.timing import peak_memory

CODES, DIM = 13, 4
USED = torch.tensor([9, 0, 5, 12])


def latents() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, DIM, 3, 5, generator=generator, dtype=torch.float64)


def quantizer_of(kind: type, *args: Any, **options: Any) -> Any:
    quantizer = kind(CODES, DIM, *args, **options).double()
    torch.nn.init.normal_(quantizer.embedding.weight, generator=torch.Generator().manual_seed(2))
    return quantizer


def definition(z: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Straight-through output, the loss that moves z, the one that moves the codes, indices."""
    rows = z.movedim(1, -1)
    indices = (rows[..., None, :] - codebook).square().sum(-1).argmin(-1)
    code = codebook[indices].movedim(-1, 1)
    out = z + (code - z).detach()
    return out, (z - code.detach()).square().mean(), (z.detach() - code).square().mean(), indices


def same_gradients(
    found: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor], on: list[Any]
) -> None:
    grad = torch.randn_like(found[0])
    mine = torch.autograd.grad((found[0] * grad).sum() + found[1], on)
    theirs = torch.autograd.grad((right[0] * grad).sum() + right[1], on)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("legacy", [True, False])
def test_vector_quantizer_2(legacy: bool) -> None:
    quantizer = quantizer_of(taming.VectorQuantizer2, 0.25, legacy=legacy)
    z = latents().requires_grad_()
    z_q, loss, (perplexity, encodings, indices) = quantizer(z)
    out, moves_z, moves_codes, right = definition(z, quantizer.embedding.weight)
    wanted = moves_z + 0.25 * moves_codes if legacy else 0.25 * moves_z + moves_codes
    assert perplexity is encodings is None
    assert torch.equal(indices, right.flatten())
    assert z_q.is_contiguous()
    # Float64, in another order.
    torch.testing.assert_close((z_q, loss), (out, wanted), rtol=1e-11, atol=1e-14)
    same_gradients((z_q, loss), (out, wanted), [z, quantizer.embedding.weight])


def test_legacy_is_the_default_and_matters() -> None:
    z = latents()
    losses = [
        quantizer_of(taming.VectorQuantizer2, 0.25, **options)(z.requires_grad_())[1]
        for options in ({}, {"legacy": True}, {"legacy": False})
    ]
    grads = [torch.autograd.grad(loss, z, retain_graph=True)[0] for loss in losses]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], 4 * grads[2])


def test_vector_quantizer() -> None:
    quantizer = quantizer_of(taming.VectorQuantizer, 0.25)
    z = latents().requires_grad_()
    z_q, loss, (perplexity, encodings, indices) = quantizer(z)
    out, moves_z, moves_codes, right = definition(z, quantizer.embedding.weight)
    wanted = moves_z + 0.25 * moves_codes
    torch.testing.assert_close((z_q, loss), (out, wanted), rtol=1e-11, atol=1e-14)
    same_gradients((z_q, loss), (out, wanted), [z, quantizer.embedding.weight])
    assert torch.equal(indices, right.reshape(-1, 1))
    one_hot = torch.nn.functional.one_hot(right.flatten(), CODES).to(z.dtype)
    assert encodings.is_sparse
    assert torch.equal(encodings.to_dense(), one_hot)
    assert torch.equal(
        encodings @ quantizer.embedding.weight, quantizer.embedding.weight[right.flatten()]
    )
    p = one_hot.mean(0)
    torch.testing.assert_close(perplexity, torch.special.entr(p).sum().exp(), rtol=1e-12, atol=0)


def test_ema_vector_quantizer() -> None:
    quantizer = taming.EMAVectorQuantizer(CODES, DIM, 0.25, decay=0.9, eps=1e-3).double()
    codes = quantizer.embedding.weight.detach().clone()
    average, size = codes.clone(), torch.zeros(CODES, dtype=torch.float64)
    z = latents().requires_grad_()
    for _ in range(3):
        z_q, loss, (perplexity, encodings, indices) = quantizer(z)
        out, moves_z, _, right = definition(z, codes)
        torch.testing.assert_close((z_q, loss), (out, 0.25 * moves_z), rtol=1e-10, atol=1e-13)
        same_gradients((z_q, loss), (out, 0.25 * moves_z), [z])
        assert torch.equal(indices, right.flatten())
        one_hot = torch.nn.functional.one_hot(indices, CODES).to(z.dtype)
        assert torch.equal(encodings.to_dense(), one_hot)
        p = one_hot.mean(0)
        torch.testing.assert_close(perplexity, torch.special.entr(p).sum().exp())
        rows = z.detach().movedim(1, -1).reshape(-1, DIM)
        size = 0.9 * size + 0.1 * one_hot.sum(0)
        average = 0.9 * average + 0.1 * one_hot.T @ rows
        smoothed = (size + 1e-3) / (size.sum() + CODES * 1e-3) * size.sum()
        codes = average / smoothed[:, None]
        embedding = quantizer.embedding
        torch.testing.assert_close(
            (embedding.weight, embedding.cluster_size, embedding.embed_avg),
            (codes, size, average),
            rtol=1e-9, atol=1e-12, check_dtype=True,
        )  # fmt: skip
    for training, update in ((False, True), (True, False)):
        before = quantizer.embedding.weight.clone()
        quantizer.train(training).embedding.update = update
        quantizer(z)
        assert torch.equal(quantizer.embedding.weight, before)


@pytest.mark.parametrize("unknown", ["random", "extra", 3])
@pytest.mark.parametrize("sane", [False, True])
def test_remap(unknown: str | int, sane: bool) -> None:
    options = {"remap": USED, "unknown_index": unknown, "sane_index_shape": sane}
    quantizer = quantizer_of(taming.VectorQuantizer2, 0.25, **options)
    z = latents()
    z_q, _, (_, _, found) = quantizer(z)
    right = definition(z, quantizer.embedding.weight)[3].flatten()
    assert found.shape == ((2, 3, 5) if sane else (30, 1))
    known = torch.isin(right, USED)
    assert 0 < known.sum() < 30
    assert torch.equal(USED[found.flatten()[known]], right[known])
    others = found.flatten()[~known]
    if unknown == "random":
        assert bool((others < 4).all())
    else:
        assert others.unique().tolist() == [4 if unknown == "extra" else 3]
    entry = quantizer.get_codebook_entry(found, (2, 3, 5, DIM))
    back = torch.where(found.flatten() >= 4, 0, found.flatten())
    expected = quantizer.embedding.weight[USED[back]].view(2, 3, 5, DIM).movedim(-1, 1)
    assert torch.equal(entry, expected)
    places = known.view(2, 1, 3, 5).expand_as(z_q)
    assert torch.equal(entry[places], z_q[places])


@pytest.mark.parametrize("kind", [taming.VectorQuantizer2, taming.VectorQuantizer])
def test_codebook_entries_and_checkpoints(kind: type) -> None:
    quantizer = quantizer_of(kind, 0.25)
    z_q, _, (_, _, indices) = quantizer(latents())
    flat = indices.flatten()
    assert torch.equal(quantizer.get_codebook_entry(flat, (2, 3, 5, DIM)), z_q)
    assert torch.equal(quantizer.get_codebook_entry(flat, None), quantizer.embedding.weight[flat])
    assert list(quantizer.state_dict()) == ["embedding.weight"]
    fresh = kind(1000, 3, 0.25).embedding.weight
    assert 0.9e-3 < fresh.abs().max() <= 1e-3


def test_names_and_arguments_are_theirs() -> None:
    expected = {
        taming.VectorQuantizer: "n_e, e_dim, beta",
        taming.VectorQuantizer2: "n_e, e_dim, beta, remap=None, unknown_index='random', "
        "sane_index_shape=False, legacy=True",
        taming.EMAVectorQuantizer: "n_embed, embedding_dim, beta, decay=0.99, eps=1e-05, "
        "remap=None, unknown_index='random'",
        taming.GumbelQuantize: "num_hiddens, embedding_dim, n_embed, straight_through=True, "
        "kl_weight=0.0005, temp_init=1.0, use_vqinterface=True, remap=None, "
        "unknown_index='random'",
    }
    for kind, arguments in expected.items():
        found = inspect.signature(kind).parameters.values()
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in found]
        assert ", ".join(map(str, bare)) == arguments
    names = {"embedding.weight", "embedding.cluster_size", "embedding.embed_avg"}
    assert set(taming.EMAVectorQuantizer(5, 3, 0.25).state_dict()) == names


@pytest.mark.parametrize("kind", [taming.VectorQuantizer2, taming.VectorQuantizer])
def test_no_matrix_of_vectors_and_codes(kind: type) -> None:
    if OPERATORS["vq_quantize"].owner("cpu") == "reference":
        pytest.skip("the reference trades memory for being readable")
    n, codes = 128 * 128, 4096
    quantizer = kind(codes, 8, 0.25)
    z = torch.randn(1, 8, 128, 128, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert peak_memory(lambda: quantizer(z)[1].backward(), "cpu") < n * codes * 4 // 4


def test_fullgraph_compile() -> None:
    quantizer = quantizer_of(taming.VectorQuantizer2, 0.25, remap=USED, unknown_index="extra")
    z = latents().requires_grad_()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    results = []
    for call in (compiled, quantizer):
        z_q, loss, (_, _, indices) = call(z)
        grads = torch.autograd.grad(z_q.sum() + loss, [z, quantizer.embedding.weight])
        results.append((z_q, loss, indices, *grads))
    torch.testing.assert_close(results[0], results[1])


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="n_e"):
        taming.VectorQuantizer2(0, 4, 0.25)
    quantizer = quantizer_of(taming.VectorQuantizer2, 0.25)
    z = latents()
    assert len(quantizer(z, temp=1.0)) == 3
    for name, value in {"temp": 2.0, "rescale_logits": True, "return_logits": True}.items():
        with pytest.raises(ValueError, match=name):
            quantizer(z, **{name: value})
    with pytest.raises(ValueError, match=r"z: expected shape \[B, 4, H, W\], got \[2, 3, 5\]"):
        quantizer(z[:, 0])
    with pytest.raises(ValueError, match="z: expected"):
        quantizer(z[:, :3])
