"""VectorQuantize and ResidualVQ against vector_quantize_pytorch. Many ranks: tests/distributed."""

import copy
import inspect
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import vector_quantize_pytorch as peers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastzoo.nn import ResidualVQ, VectorQuantize
from fastzoo.testing.timing import peak_memory

DIM, CODES = 6, 11
# The peer rounds every intermediate result to float32, and turns a vector by matrix products.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def same(actual: Any, expected: Any, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **{**CLOSE, **tolerance})


def both(kind: str = "VectorQuantize", **options: Any) -> tuple[Any, Any]:
    """Ours and the peer's, with the same weights."""
    torch.manual_seed(0)
    theirs = getattr(peers, kind)(**{"dim": DIM, "codebook_size": CODES, **options})
    ours = {"VectorQuantize": VectorQuantize, "ResidualVQ": ResidualVQ}[kind]
    mine = ours(**{"dim": DIM, "codebook_size": CODES, **options})
    state = theirs.state_dict()
    for name in [name for name in state if name.endswith("embed")]:
        # Codes among the vectors, or one of them takes all.
        codes = torch.randn_like(state[name])
        codes = F.normalize(codes, dim=-1) if options.get("use_cosine_sim") else codes
        state[name].copy_(codes)
        state[name.replace("embed", "embed_avg")].copy_(codes)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def step(module: nn.Module, x: Tensor, weight: Tensor | None = None, **call: Any) -> list[Tensor]:
    """Output, indices, loss and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    module.zero_grad()
    quantized, indices, loss, *_ = module(x, **call)
    objective = (
        loss.sum() + (quantized * torch.linspace(-1, 2, quantized.numel()).view_as(quantized)).sum()
    )
    if objective.requires_grad:
        objective.backward()
    gradients = [x.grad, *(p.grad for p in module.parameters())]
    return [quantized, indices, loss, *(g for g in gradients if g is not None)]


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "straight-through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "projected": {"codebook_dim": 4},
    "layernorm": {"codebook_dim": 4, "layernorm_after_project_in": True},
    "heads": {"heads": 3, "codebook_dim": 2},
    "codebook-a-head": {"heads": 3, "codebook_dim": 2, "separate_codebook_per_head": True},
    "cosine-heads": {
        "heads": 2,
        "codebook_dim": 4,
        "separate_codebook_per_head": True,
        "use_cosine_sim": True,
    },
    "learnable": {"learnable_codebook": True, "ema_update": False},
    "learnable-unrouted": {
        "learnable_codebook": True,
        "ema_update": False,
        "route_gradients_to_input": False,
    },
    "frozen": {"freeze_codebook": True},
    "learnable-frozen": {
        "learnable_codebook": True,
        "ema_update": False,
        "freeze_codebook": True,
    },
    "counted": {"manual_ema_update": True},
    "decay": {"decay": 0.3, "eps": 1e-2, "commitment_weight": 0.25},
    "uncommitted": {"commitment_weight": 0.0},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "orthogonal-active": {
        "orthogonal_reg_weight": 3.0,
        "orthogonal_reg_active_codes_only": True,
    },
    "one-dimension": {"heads": 6, "codebook_dim": 1, "rotation_trick": False},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_training_steps_are_the_peers(name: str) -> None:
    mine, theirs = both(**VARIANTS[name])
    for seed in range(4):
        x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))
        same(step(mine, x), step(theirs, x))
        same(mine.state_dict(), theirs.state_dict())
    mine.eval(), theirs.eval()
    before = copy.deepcopy(mine.state_dict())
    same(step(mine, x), step(theirs, x))
    same(mine.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("active", [False, True])
def test_orthogonality_of_drawn_codes(active: bool) -> None:
    options = {"orthogonal_reg_weight": 1.0, "orthogonal_reg_active_codes_only": active}
    mine, _ = both(**options, orthogonal_reg_max_codes=4, commitment_weight=0.0, ema_update=False)
    _, indices, loss = mine(torch.randn(1, 6, DIM))
    codes = indices.unique() if active else torch.arange(CODES)
    cosine = F.normalize(mine.codebook[codes], dim=-1)
    square = (cosine @ cosine.T).square()
    drawn = list(itertools.combinations(range(len(codes)), 4))
    values = torch.stack([square[list(own)][:, list(own)].mean() - 1 / 4 for own in drawn])
    assert (values - loss).abs().amin() < 1e-6


def mask_of(shape: tuple[int, ...], seed: int = 5) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6


@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("name", ["plain", "projected"])
def test_masks_are_the_peers(name: str, zeros: bool) -> None:
    mine, theirs = both(**VARIANTS[name], return_zeros_for_masked_padding=zeros)
    if name == "projected":
        # The peer's masked loss would compare codes with the input before its projection.
        mine.commitment_weight = theirs.commitment_weight = 0.0
        theirs.has_commitment_loss = False
    x, mask = torch.randn(3, 7, DIM), mask_of((3, 7))
    for _ in range(2):
        same(step(mine, x, mask=mask), step(theirs, x, mask=mask))
        same(mine.state_dict(), theirs.state_dict())
    lens = torch.tensor([7, 0, 3])
    same(step(mine, x, lens=lens), step(theirs, x, lens=lens))


@pytest.mark.parametrize("name", ["cosine", "heads", "codebook-a-head", "projected"])
def test_masked_vectors_count_nowhere(name: str) -> None:
    whole, _ = both(**VARIANTS[name])
    masked = copy.deepcopy(whole)
    x, mask = torch.randn(3, 7, DIM), mask_of((3, 7))
    x[~mask] = 50.0
    kept = x[mask]
    expected = step(whole, kept)
    output, indices, loss, gradient, *_ = step(masked, x, mask=mask)
    same(output[mask], expected[0])
    assert torch.equal(indices[mask], expected[1])
    same(loss, expected[2])
    assert not output[~mask].any()
    assert (indices[~mask] == -1).all()
    assert not gradient[~mask].any()
    same(masked.state_dict(), whole.state_dict())


@pytest.mark.parametrize(
    ("option", "shape"),
    [
        ({"accept_image_fmap": True}, (2, DIM, 3, 4)),
        ({"accept_3d_fmap": True}, (2, DIM, 3, 2, 2)),
        ({"channel_last": False}, (2, DIM, 5)),
        ({"channel_last": False}, (7, DIM)),
        ({}, (7, DIM)),
    ],
    ids=["image", "3d", "channel-first", "channel-first-one", "one"],
)
@pytest.mark.parametrize("name", ["plain", "heads", "codebook-a-head", "projected"])
def test_layouts_are_the_peers(name: str, option: dict[str, Any], shape: tuple[int, ...]) -> None:
    mine, theirs = both(**VARIANTS[name], **option)
    x = torch.randn(shape)
    same(step(mine, x), step(theirs, x))
    same(mine.state_dict(), theirs.state_dict())
    mine.eval(), theirs.eval()
    quantized, indices, _ = mine(x)
    output = mine.get_output_from_indices(indices)
    if len(shape) == 2 and option:
        output = output.view_as(quantized)
    same(output, quantized)
    if name == "plain" and len(shape) > 2:
        same(mine.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))


def test_any_leading_shape() -> None:
    mine, _ = both()
    mine.eval()
    x = torch.randn(2, 3, 4, DIM)
    quantized, indices, _ = mine(x, mask=mask_of((2, 3, 4)))
    flat, chosen, _ = mine(x.view(1, -1, DIM), mask=mask_of((2, 3, 4)).view(1, -1))
    assert torch.equal(quantized, flat.view_as(x))
    assert torch.equal(indices, chosen.view(2, 3, 4))


RESIDUAL: dict[str, dict[str, Any]] = {
    "plain": {"num_quantizers": 3},
    "straight-through": {"num_quantizers": 3, "rotation_trick": False},
    "projected": {"num_quantizers": 2, "codebook_dim": 4},
    "cosine": {"num_quantizers": 2, "use_cosine_sim": True},
    "sizes": {"codebook_size": (11, 5, 3)},
    "shared": {"num_quantizers": 3, "shared_codebook": True},
    "learnable": {"num_quantizers": 2, "learnable_codebook": True, "ema_update": False},
    "through": {"num_quantizers": 3, "quant_grad_frac": 0.25},
    "through-all": {"num_quantizers": 3, "quant_grad_frac": 1.0},
    "one": {"num_quantizers": 1},
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_residual_steps_are_the_peers(name: str) -> None:
    mine, theirs = both("ResidualVQ", **RESIDUAL[name])
    for seed in range(3):
        x = torch.randn(2, 9, DIM, generator=torch.Generator().manual_seed(seed))
        same(step(mine, x), step(theirs, x))
        same(mine.state_dict(), theirs.state_dict())
    mask = mask_of((2, 9))
    if name != "cosine":
        same(step(mine, x, mask=mask), step(theirs, x, mask=mask))
    mine.eval(), theirs.eval()
    same(step(mine, x), step(theirs, x))
    *results, codes = mine(x, return_all_codes=True)
    *expected, their_codes = theirs(x, return_all_codes=True)
    same(results, expected)
    same(codes, their_codes)
    same(mine.codebooks, theirs.codebooks)
    same(mine.get_output_from_indices(results[1]), results[0])


@pytest.mark.parametrize(
    "option", [{}, {"quantize_dropout_cutoff_index": 2}, {"quantize_dropout_multiple_of": 2}]
)
def test_dropped_stages_are_the_peers(option: dict[str, int]) -> None:
    mine, theirs = both("ResidualVQ", num_quantizers=4, quantize_dropout=True, **option)
    x, left_out = torch.randn(2, 5, DIM), set()
    for seed in range(8):
        results = step(mine, x, rand_quantize_dropout_fixed_seed=seed)
        same(results, step(theirs, x, rand_quantize_dropout_fixed_seed=seed))
        coarse = results[1]
        left_out.add(int((coarse[0, 0] == -1).sum()))
        fine = coarse[..., : 4 - int((coarse[0, 0] == -1).sum())]
        given = mine.get_codes_from_indices(fine)
        assert torch.equal(given, mine.get_codes_from_indices(coarse))
        same(mine.get_output_from_indices(fine), given.sum(0))
    assert len(left_out) > 1
    assert -1 not in mine.eval()(x)[1]


@pytest.mark.parametrize(
    ("option", "shape"),
    [
        ({"accept_image_fmap": True}, (2, DIM, 3, 4)),
        ({"accept_3d_fmap": True}, (2, DIM, 3, 2, 2)),
        ({"channel_last": False}, (2, DIM, 5)),
    ],
)
def test_a_chain_over_maps_is_one_over_vectors(
    option: dict[str, bool], shape: tuple[int, ...]
) -> None:
    # The peer's raises here.
    mine, _ = both("ResidualVQ", num_quantizers=2, codebook_dim=4)
    maps, _ = both("ResidualVQ", num_quantizers=2, codebook_dim=4)
    for name, value in option.items():
        setattr(maps, name, value)
    x = torch.randn(shape)
    quantized, indices, losses, *_ = maps(x)
    expected, *rest = mine(x.movedim(1, -1))
    same(quantized, expected.movedim(-1, 1))
    same([indices, losses], rest)
    same(maps.eval().get_output_from_indices(indices), mine.get_output_from_indices(indices))
    same(maps.state_dict(), mine.state_dict())


def test_a_shared_codebook_moves_once_all_stages_are_through() -> None:
    mine, _ = both("ResidualVQ", num_quantizers=3, shared_codebook=True, threshold_ema_dead_code=2)
    x = torch.randn(2, 9, DIM)
    evaluated = copy.deepcopy(mine).eval()(x)
    trained = mine(x)
    same(trained[0], evaluated[0])
    assert torch.equal(trained[1], evaluated[1])
    assert len({id(stage._codebook) for stage in mine.layers}) == 1


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
def test_freezing(kind: str) -> None:
    stages = {} if kind == "VectorQuantize" else {"num_quantizers": 2, "shared_codebook": True}
    mine, _ = both(kind, **stages, threshold_ema_dead_code=2)
    frozen, _ = both(kind, **stages, threshold_ema_dead_code=2, freeze_codebook=True)
    before = copy.deepcopy(mine.state_dict())
    x = torch.randn(2, 9, DIM)
    results = mine(x, freeze_codebook=True)
    same(results, frozen(x))
    for module in (mine, frozen):
        same(module.state_dict(), before, rtol=0, atol=0)
    frozen(x, freeze_codebook=False)
    mine.eval()(x)
    same(mine.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(AssertionError):
        same(frozen.state_dict(), before)


@pytest.mark.parametrize("name", ["plain", "codebook-a-head", "projected", "learnable"])
def test_checkpoints_go_both_ways(name: str) -> None:
    mine, theirs = both(**VARIANTS[name])
    x = torch.randn(2, 9, DIM)
    step(mine, x)
    theirs.load_state_dict(mine.state_dict())
    mine.eval(), theirs.eval()
    same(list(mine(x)), list(theirs(x)))
    chain, theirs = both("ResidualVQ", num_quantizers=2)
    step(chain, x)
    theirs.load_state_dict(chain.state_dict())
    same(list(chain.eval()(x)), list(theirs.eval()(x)))


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
@pytest.mark.parametrize("seed", [1, 2])
def test_the_same_seed_starts_alike(kind: str, seed: int) -> None:
    options = {"dim": 4, "codebook_size": 5, "codebook_dim": 3}
    ours: Any = VectorQuantize if kind == "VectorQuantize" else ResidualVQ
    if kind == "ResidualVQ":
        options["num_quantizers"] = 2
    torch.manual_seed(seed)
    mine = ours(**options)
    torch.manual_seed(seed)
    same(mine.state_dict(), getattr(peers, kind)(**options).state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["plain", "cosine", "codebook-a-head", "heads", "learnable"])
def test_dead_codes_become_vectors_of_the_batch(name: str, masked: bool) -> None:
    mine, _ = both(**VARIANTS[name], threshold_ema_dead_code=2)
    book = mine._codebook
    book.cluster_size[:, ::2] = 1e-3
    book.cluster_size[:, 1::2] = 100.0
    x, mask = torch.randn(2, 9, DIM), mask_of((2, 9)) if masked else torch.ones(2, 9).bool()
    untouched = copy.deepcopy(mine)
    untouched._codebook.threshold_ema_dead_code = 1e-9
    step(untouched, x, mask=mask)
    step(mine, x, mask=mask)
    dead = untouched._codebook.cluster_size < 2
    vectors = book.normalized(x[mask].view(-1, len(dead), book.embed.shape[2]))
    if name == "heads":
        vectors = book.normalized(x[mask].view(-1, 1, book.embed.shape[2]))
    vectors = vectors.transpose(0, 1)
    assert dead.any()
    for head in range(len(dead)):
        drawn = book.embed[head][dead[head]]
        distances = torch.cdist(drawn, vectors[head])
        assert (distances.amin(1) < 1e-6).all()
        assert len(distances.argmin(1).unique()) == len(drawn), "no vector twice"
    assert (book.cluster_size[dead] == 2).all()
    same(book.embed_avg[dead], 2 * book.embed[dead])
    for buffer in ("embed", "embed_avg", "cluster_size"):
        kept = getattr(untouched._codebook, buffer)[~dead]
        assert torch.equal(getattr(book, buffer)[~dead], kept)


def test_of_more_dead_codes_than_vectors_the_first_are_replaced() -> None:
    mine, _ = both(threshold_ema_dead_code=2)
    mine._codebook.cluster_size.zero_()
    mine(torch.randn(1, 3, DIM))
    assert (mine._codebook.cluster_size == 2).sum() == 3
    assert mine(torch.randn(0, 3, DIM))[0].shape == (0, 3, DIM)


def test_draws_of_dead_codes_are_uniform() -> None:
    mine, _ = both(threshold_ema_dead_code=1)
    x = torch.randn(1, 8, DIM)
    seen = torch.zeros(8)
    for _ in range(200):
        mine._codebook.cluster_size.fill_(9.0)
        mine._codebook.cluster_size[0, :2] = 0.0
        mine._codebook.replace_dead_(x.view(-1, 1, DIM), None)
        seen[torch.cdist(mine.codebook[:2], x[0]).argmin(1)] += 1
    # 400 draws of 8: each 50 by chance, of standard deviation 6.
    assert seen.amin() > 20
    assert seen.amax() < 80


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cosine_sim": True},
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
    ],
    ids=["l2", "cosine", "heads"],
)
def test_kmeans_starts_the_codebook_once(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    x = torch.randn(400, DIM)
    mine = VectorQuantize(DIM, CODES, kmeans_init=True, kmeans_iters=20, **options).eval()
    theirs = peers.VectorQuantize(DIM, CODES, kmeans_init=True, kmeans_iters=20, **options).eval()
    found, other = mine(x[None])[0], theirs(x[None])[0]
    target = F.normalize(x, dim=-1) if options.get("use_cosine_sim") else x
    # Local minima of one cloud are alike; one code for all would be far from them.
    inertia = (found - target).square().mean()
    assert inertia < 1.1 * (other - target).square().mean()
    assert inertia < 0.7 * target.var()
    assert mine._codebook.initted
    assert int(mine._codebook.cluster_size.sum()) == len(x) * len(mine._codebook.embed)
    before = copy.deepcopy(mine.state_dict())
    mine(x[None] + 1)
    same(mine.state_dict(), before, rtol=0, atol=0)
    loaded = VectorQuantize(DIM, CODES, kmeans_init=True, **options).eval()
    loaded.load_state_dict(before)
    assert torch.equal(loaded(x[None])[0], found)
    fresh = VectorQuantize(DIM, CODES, kmeans_init=True, **options)
    loaded.load_state_dict(fresh.state_dict())
    loaded(x[None])
    assert loaded.codebook.any(), "what was loaded had not been initialised"


def test_kmeans_of_fewer_vectors_than_codes() -> None:
    mine = VectorQuantize(DIM, CODES, kmeans_init=True)
    x = torch.randn(1, 5, DIM)
    mask = torch.tensor([[True, True, True, False, False]])
    quantized, _, _ = mine(x, mask=mask)
    same(quantized[mask], x[mask])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32(dtype: torch.dtype) -> None:
    mine, theirs = both()
    x = torch.randn(2, 9, DIM).to(dtype)
    results = step(mine, x)
    expected = step(theirs, x.float())
    assert results[0].dtype == dtype
    assert results[2].dtype == torch.float32
    assert torch.equal(results[1], expected[1])
    same(results[2], expected[2])
    # Rounded to the dtype at the end.
    unit = max(torch.finfo(dtype).eps, 1e-5)
    same(results[0].float(), expected[0], rtol=unit)
    same(mine.state_dict(), theirs.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        quantized, indices, _ = mine.eval()(x.float())
    assert torch.equal(indices, theirs.eval()(x.float())[1])
    assert quantized.dtype == torch.float32


def test_a_module_in_float64() -> None:
    mine, _ = both()
    mine.double()
    x = torch.randn(2, 3, DIM, dtype=torch.float64, requires_grad=True)
    mine.freeze_codebook, mine.rotation_trick = True, False
    indices = mine(x)[1]
    assert torch.autograd.gradcheck(lambda x: mine(x)[2], x)
    assert torch.equal(mine.codebook[indices], mine(x)[0])


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"threshold_ema_dead_code": 2},
        {"heads": 2, "codebook_dim": 3, "separate_codebook_per_head": True},
        {"use_cosine_sim": True},
        {"kmeans_init": True},
    ],
    ids=["plain", "dead", "heads", "cosine", "kmeans"],
)
def test_one_graph(option: dict[str, Any]) -> None:
    mine, _ = both(**option)
    if option.get("kmeans_init"):
        # The first batch waits for the device; no later one does.
        mine(torch.randn(2, 9, DIM))
    other = copy.deepcopy(mine)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        x = torch.randn(2, 9, DIM)
        torch.manual_seed(seed)
        expected = step(mine, x)
        torch.manual_seed(seed)
        same(step(compiled, x), expected)
        if not option.get("threshold_ema_dead_code"):
            same(other.state_dict(), mine.state_dict())


def test_a_chain_is_one_graph() -> None:
    mine, _ = both("ResidualVQ", num_quantizers=2)
    other = copy.deepcopy(mine)
    x = torch.randn(2, 9, DIM)
    same(step(torch.compile(other, fullgraph=True, backend="aot_eager"), x), step(mine, x))
    same(other.state_dict(), mine.state_dict())


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_count_a_batch_once(reentrant: bool) -> None:
    mine, _ = both()
    other = copy.deepcopy(mine)
    x = torch.randn(2, 9, DIM, requires_grad=True)
    quantized, _, loss = checkpoint(mine, x, use_reentrant=reentrant)
    (quantized.sum() + loss).backward()
    other(x)
    same(mine.state_dict(), other.state_dict())


@pytest.mark.parametrize(
    ("option", "error", "text"),
    [
        ({"stochastic_sample_codes": True}, ValueError, "stochastic_sample_codes: .*GumbelVQ"),
        ({"affine_param": True}, ValueError, "affine_param"),
        ({"in_place_codebook_optimizer": torch.optim.SGD}, ValueError, "learnable_codebook=True"),
        ({"commitment_use_cross_entropy_loss": True}, ValueError, "N x K"),
        ({"decoy": 1}, TypeError, "decoy"),
        ({"learnable_codebook": True, "ema_update": True}, ValueError, "ema_update"),
        ({"learnable_codebook": True, "use_cosine_sim": True}, ValueError, "use_cosine_sim"),
        ({"sync_kmeans": False, "kmeans_init": True}, ValueError, "sync_kmeans"),
        ({"heads": 0}, ValueError, "heads: expected at least 1"),
    ],
)
def test_arguments_without_support_say_so(option: dict[str, Any], error: type, text: str) -> None:
    with pytest.raises(error, match=text):
        VectorQuantize(DIM, CODES, **option)


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ({"diveq": True}, "diveq: .*rotation_trick"),
        ({"beam_size": 2}, "beam_size"),
        ({"implicit_neural_codebook": True}, "implicit_neural_codebook"),
        ({"heads": 2}, "heads: expected 1"),
        ({"num_quantizers": None}, "num_quantizers"),
        ({"codebook_size": (3, 4, 5)}, "num_quantizers: expected 3"),
        ({"codebook_size": (3, 4), "shared_codebook": True}, "shared_codebook"),
        ({"quantize_dropout_cutoff_index": 2}, "quantize_dropout_cutoff_index: expected 0 to 1"),
    ],
)
def test_arguments_of_a_chain_without_support_say_so(option: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ResidualVQ(**{"dim": DIM, "codebook_size": CODES, "num_quantizers": 2, **option})


@pytest.mark.parametrize("kind", ["VectorQuantize", "ResidualVQ"])
def test_every_argument_of_the_peer_is_known(kind: str) -> None:
    def defaults(function: Any) -> dict[str, Any]:
        parameters = inspect.signature(function).parameters.items()
        return {name: p.default for name, p in parameters if p.default is not p.empty}

    theirs = getattr(peers, kind)
    ours: Any = VectorQuantize if kind == "VectorQuantize" else ResidualVQ
    stages = {} if kind == "VectorQuantize" else {"num_quantizers": 2}
    module = ours(**{**defaults(theirs.__init__), "dim": DIM, "codebook_size": CODES, **stages})
    module(torch.randn(1, 2, DIM), **defaults(theirs.forward))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ({"x": torch.zeros(2, 3, DIM + 1)}, "x: expected"),
        ({"x": torch.zeros(2, 3, DIM), "mask": torch.ones(2, 2).bool()}, "mask: expected"),
        ({"x": torch.zeros(2, DIM), "lens": torch.ones(2), "mask": torch.ones(2).bool()}, "lens"),
        ({"x": torch.zeros(2, 3, DIM), "topk": 2}, "topk: .*vq_nearest"),
        ({"x": torch.zeros(2, 3, DIM), "indices": torch.zeros(2, 3).long()}, "indices: "),
    ],
)
def test_bad_calls_name_the_argument(call: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        VectorQuantize(DIM, CODES)(**call)
    with pytest.raises(ValueError, match="precision: expected"):
        VectorQuantize(DIM, CODES, precision="low")(torch.zeros(2, DIM))
    with pytest.raises(TypeError, match="x: expected float32"):
        VectorQuantize(DIM, CODES)(torch.zeros(2, DIM).long())


def test_no_memory_of_vectors_times_codes() -> None:
    n, codes, dim = 4096, 8192, 8
    mine = VectorQuantize(dim, codes, threshold_ema_dead_code=2)
    x = torch.randn(1, n, dim, requires_grad=True)

    def train() -> None:
        quantized, _, loss = mine(x)
        (quantized.sum() + loss).backward()

    train()
    # In float32 the distances alone would take 128 MB.
    assert peak_memory(train, "cpu") < n * codes * 4 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_module_in_half_precision_keeps_counting(dtype: torch.dtype) -> None:
    mine, _ = both(decay=0.999)
    wide = copy.deepcopy(mine)
    mine.to(dtype)
    x = torch.randn(2, 50, DIM).to(dtype)
    assert mine(x)[0].dtype == dtype
    assert mine.codebook.dtype == dtype
    wide.codebook = wide.codebook.to(dtype).float()
    wide(x.float())
    same(mine._codebook.cluster_size, wide._codebook.cluster_size)
    same(mine._codebook.embed_avg, wide._codebook.embed_avg)
    same(mine.codebook, wide.codebook.to(dtype), rtol=torch.finfo(dtype).eps)
