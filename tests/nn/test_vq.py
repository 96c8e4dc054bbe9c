"""VectorQuantize and ResidualVQ against vector_quantize_pytorch. Many ranks: tests/distributed."""

import copy
from typing import Any

import pytest
import torch
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
    for buffer in (name for name in theirs.state_dict() if name.endswith("embed")):
        # Codes among the vectors, or one of them takes all.
        codes = theirs.get_buffer(buffer) if buffer in dict(theirs.named_buffers()) else None
        codes = theirs.get_parameter(buffer) if codes is None else codes
        with torch.no_grad():
            codes.copy_(torch.randn_like(codes))
            if options.get("use_cosine_sim"):
                codes.copy_(torch.nn.functional.normalize(codes, dim=-1))
        average = theirs.get_buffer(buffer.replace("embed", "embed_avg"))
        average.copy_(codes.detach())
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
