"""Lookup-free quantisation: every dimension is rounded to its sign."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo.nn._scalar_quantizer import ScalarQuantizer, straight_through
from fastzoo.ops._checks import check_tensor
from fastzoo.ops._collectives import for_average, sum_over
from fastzoo.reference.precision import compute_dtype

# Rows are taken together as long as one half of their bits has at most this many probabilities.
CHUNK = 2**20


class LFQOutput(NamedTuple):
    quantized: Tensor
    indices: Tensor
    entropy_aux_loss: Tensor


class LFQLosses(NamedTuple):
    per_sample_entropy: Tensor
    batch_entropy: Tensor
    commitment: Tensor


def bit_entropies(logits: Tensor) -> Tensor:
    """Of bits that are 1 with probability sigmoid(logits): exact however certain they are, since
    no term is subtracted."""
    one, zero = torch.sigmoid(logits), torch.sigmoid(-logits)
    return -(one * F.logsigmoid(logits) + zero * F.logsigmoid(-logits))


def _joint(logits: Tensor) -> Tensor:
    """``[C, 2^d, N]`` of ``[C, d, N]``: how probable each setting of independent bits is, the first
    bit counting most."""
    p = logits.new_ones(len(logits), 1, logits.shape[-1])
    for bit in torch.stack([torch.sigmoid(-logits), torch.sigmoid(logits)], 2).unbind(1):
        p = (p.unsqueeze(2) * bit.unsqueeze(1)).flatten(1, 2)
    return p


def _to_logits(grads: Tensor, logits: Tensor) -> Tensor:
    """The gradient of logits ``[C, d, N]``, of those of the logarithms of :func:`_joint`: a bit
    that is 1 has the derivative 1 - p, the others have -p."""
    bits = logits.shape[1]
    place = torch.arange(bits - 1, -1, -1, device=logits.device)
    settings = torch.arange(2**bits, device=logits.device)
    ones = (settings >> place[:, None] & 1).to(logits.dtype)
    return torch.sigmoid(-logits) * (ones @ grads) - torch.sigmoid(logits) * ((1 - ones) @ grads)


class _SumOfDistributions(torch.autograd.Function):
    """``[C, 2^h, 2^l]`` of ``logits [C, h + l, N]`` and ``weight [N]``. The high bits of a code are
    independent of its low ones, so a row's distribution is an outer product, and a sum over rows
    is a product of two matrices. Rows come in chunks."""

    @staticmethod
    def _chunks(logits: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        half = (logits.shape[1] + 1) // 2
        rows = max(1, CHUNK // (len(logits) << half))
        for part, weights in zip(logits.split(rows, -1), weight.split(rows), strict=True):
            high, low = part.split([half, part.shape[1] - half], 1)
            yield high, low, weights

    @staticmethod
    def forward(logits: Tensor, weight: Tensor) -> Tensor:
        total = logits.new_zeros(())
        with torch.autocast(logits.device.type, enabled=False):
            for high, low, weights in _SumOfDistributions._chunks(logits, weight):
                total = total + _joint(high) * weights @ _joint(low).mT
        return total

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        found = []
        with torch.autocast(grad.device.type, enabled=False):
            for high, low, weights in _SumOfDistributions._chunks(*ctx.saved_tensors):
                p_high, p_low = _joint(high), _joint(low)
                of_high = _to_logits(grad @ p_low * p_high * weights, high)
                of_low = _to_logits(grad.mT @ p_high * p_low * weights, low)
                found.append(torch.cat([of_high, of_low], 1))
        return torch.cat(found, -1), None


def sum_of_distributions(logits: Tensor, weight: Tensor) -> Tensor:
    """``[C, 2^d]``: over rows ``logits [N, C, d]``, each times its ``weight [N]``, the sum of how
    probable each code is. The gradient goes to the logits."""
    by_bit = logits.permute(1, 2, 0).contiguous()
    total: Tensor = _SumOfDistributions.apply(by_bit, weight)  # type: ignore[no-untyped-call]
    return total.flatten(1)


class LFQ(ScalarQuantizer):
    """Lookup-free quantisation, with the arguments of lucidrains' vector_quantize_pytorch.

    A code has ``log2(codebook_size)`` dimensions, each ``codebook_scale`` or minus that: the sign
    of the input, minus for 0. The index of a code counts the last dimension fastest. In training
    the loss is ``entropy_loss_weight (mean H(p(c|x)) - diversity_gamma H(mean p(c|x))) +
    commitment_loss_weight mean (x - c)^2``, with ``p(c|x)`` the softmax over all codes of
    ``2 inv_temperature x'c``, both means over the vectors; in evaluation it is 0.

    The entropies are those of the formula, but no N x codebook_size matrix is made. Given x the
    bits of c are independent, so ``H(p(c|x))`` is a sum of entropies of bits; and the mean of
    ``p(c|x)`` is the product of two matrices, ``[2^h, N]`` of the high half of the bits and
    ``[N, 2^l]`` of the low one, ``h + l = log2(codebook_size)``.

    Memory: besides the input and the output about six tensors of ``codebook_size`` (its mean
    distribution, logarithm and gradient) and, for chunks of vectors, about six of 4 MB in float32;
    with ``entropy_loss_weight=0`` none of them.

    Args:
        dim: channels of the input; None is ``log2(codebook_size) * num_codebooks``. Another number
            is projected there and back (``project_in``, ``project_out``).
        codebook_size: a power of two, at least 2; None is ``2 ** dim``.
        entropy_loss_weight, commitment_loss_weight, diversity_gamma: of the loss.
        straight_through_activation: applied to the vector whose gradient the quantised one gets;
            None is the identity.
        num_codebooks: how many codes an input vector has, side by side. Losses are their mean.
        keep_num_codebooks_dim: whether indices have a last dimension of codebooks; None where there
            are several, when it cannot be left out.
        codebook_scale: the absolute value of a code's dimensions.
        has_projections: None where ``dim`` asks for them.
        projection_has_bias: of both projections.
        soft_clamp_input_value: bounds the projected input by ``v tanh(x / v)``; at least
            ``codebook_scale``.
        channel_first: whether channels are the second dimension; None where there are four
            dimensions or more: images, videos.
        spherical: input and codes are scaled to the length ``codebook_scale`` (BSQ).

    Attributes:
        codebook: all codes ``[codebook_size, log2(codebook_size)]``, made when it is asked for.

    Under torch.distributed the mean of ``p(c|x)`` is over all ranks' vectors, so every rank must
    run each training forward; the gradient is meant for DistributedDataParallel, which averages.

    Beside lucidrains' class: its logarithms are of probabilities raised to at least 1e-5, which
    changes the entropies; its mean over ranks is not one (it drops the sum and divides by the
    number of ranks); it computes float64 in float32. Its other arguments do not exist here. State
    dicts are the same.

    Half precision is quantised in float32, also under autocast. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong kind; the message names it.

    Source: Yu et al., Language Model Beats Diffusion: Tokenizer is Key to Visual Generation (2023),
    section 3.1; spherical: Zhao et al., Image and Video Tokenization with Binary Spherical
    Quantization (2024).
    """

    mask: Tensor

    def __init__(
        self,
        *,
        dim: int | None = None,
        codebook_size: int | None = None,
        entropy_loss_weight: float = 0.1,
        commitment_loss_weight: float = 0.0,
        diversity_gamma: float = 1.0,
        straight_through_activation: nn.Module | None = None,
        num_codebooks: int = 1,
        keep_num_codebooks_dim: bool | None = None,
        codebook_scale: float = 1.0,
        has_projections: bool | None = None,
        projection_has_bias: bool = True,
        soft_clamp_input_value: float | None = None,
        channel_first: bool | None = None,
        spherical: bool = False,
    ) -> None:
        if codebook_size is None:
            if dim is None:
                raise ValueError("dim, codebook_size: expected at least one of them, got None")
            codebook_size = 2**dim
        if codebook_size < 2 or codebook_size & (codebook_size - 1) or codebook_size > 2**62:
            raise ValueError(
                f"codebook_size: expected a power of 2 from 2 to 2^62, got {codebook_size}"
            )
        if not codebook_scale > 0:
            raise ValueError(f"codebook_scale: expected more than 0, got {codebook_scale}")
        if soft_clamp_input_value is not None and soft_clamp_input_value < codebook_scale:
            raise ValueError(
                f"soft_clamp_input_value: expected at least codebook_scale, {codebook_scale}, "
                f"got {soft_clamp_input_value}"
            )
        bits = codebook_size.bit_length() - 1
        super().__init__(
            bits,
            dim=dim,
            num_codebooks=num_codebooks,
            keep_num_codebooks_dim=keep_num_codebooks_dim,
            has_projections=has_projections,
            projection_has_bias=projection_has_bias,
            channel_first=channel_first,
        )
        self.codebook_size = codebook_size
        self.codebook_scale = codebook_scale
        self.entropy_loss_weight = entropy_loss_weight
        self.commitment_loss_weight = commitment_loss_weight
        self.diversity_gamma = diversity_gamma
        self.soft_clamp_input_value = soft_clamp_input_value
        self.spherical = spherical
        self.activation = straight_through_activation or nn.Identity()
        # What each bit counts in an index; checkpoints of lucidrains' class have it.
        self.register_buffer("mask", 2 ** torch.arange(bits - 1, -1, -1))

    @property
    def _magnitude(self) -> float:
        """Of each dimension of a code."""
        return self.codebook_scale / (math.sqrt(self.codebook_dim) if self.spherical else 1)

    def _codes_of(self, indices: Tensor) -> Tensor:
        positive = indices.unsqueeze(-1) & self.mask != 0
        return (2 * positive.to(self._code_dtype()) - 1) * self._magnitude

    @property
    def codebook(self) -> Tensor:
        return self._codes_of(torch.arange(self.codebook_size, device=self.mask.device))

    def indices_to_codes(self, indices: Tensor, project_out: bool = True) -> Tensor:
        """The quantised vectors of indices as :meth:`forward` returns both, or what they are before
        ``project_out``; in the dtype of the projection, the default one without."""
        return self._leave(self._codes_of(self._by_codebook(indices)), project_out)

    def _weights(self, mask: Tensor | None, x: Tensor) -> Tensor:
        """What each vector of ``x [..., C, d]`` counts in the losses."""
        places = x.shape[:-2]
        if mask is None:
            return x.new_ones(places.numel())
        check_tensor("mask", mask, "[...], a truth value for each vector", -1)
        if mask.dtype != torch.bool:
            raise TypeError(f"mask: expected bool, got {mask.dtype}")
        # Images may have theirs as lucidrains has it, flattened.
        if mask.shape not in (places, (*places[:1], places[1:].numel())):
            raise ValueError(f"mask: expected {list(places)}, got {list(mask.shape)}")
        return mask.reshape(-1).to(x.dtype)

    def _entropies(
        self, x: Tensor, weight: Tensor, inv_temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Per vector ``[N]`` of ``x [N, C, d]``, and of the mean distribution."""
        # Two codes that differ in one bit are 2 * magnitude * x apart in x'c.
        logits = (
            4 * inv_temperature * self._magnitude * torch.where(weight[:, None, None] > 0, x, 0)
        )
        total = sum_of_distributions(logits, weight)
        mean = sum_over(for_average(total, None), None)
        mean = mean / sum_over(weight.sum(), None).clamp_min(1)
        # A probability of 0 keeps a finite gradient.
        logarithm = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        return bit_entropies(logits).sum(-1).mean(-1), -(mean * logarithm).sum(-1).mean()

    def _losses(
        self, x: Tensor, codes: Tensor, weight: Tensor, inv_temperature: float, all_of_them: bool
    ) -> LFQLosses:
        def mean(each: Tensor) -> Tensor:
            return (each * weight).sum() / weight.sum().clamp_min(1)

        x, codes = x.flatten(0, -3), codes.flatten(0, -3)
        per_sample = batch = commitment = x.new_zeros(())
        if all_of_them or self.entropy_loss_weight != 0:
            each, batch = self._entropies(x, weight, inv_temperature)
            per_sample = mean(each)
        if all_of_them or self.commitment_loss_weight != 0:
            commitment = mean((x - codes).square().mean((-2, -1)))
        return LFQLosses(per_sample, batch, commitment)

    def forward(
        self,
        x: Tensor,
        inv_temperature: float = 100.0,
        return_loss_breakdown: bool = False,
        mask: Tensor | None = None,
    ) -> LFQOutput | tuple[LFQOutput, LFQLosses]:
        """``(quantized, indices, entropy_aux_loss)``: the shape and dtype of ``x [..., dim]`` (or
        ``[B, dim, ...]``), int64 ``[...]`` (``[..., num_codebooks]`` with
        ``keep_num_codebooks_dim``), and a scalar in float32 (float64 for float64).

        In training the gradient of ``quantized`` goes to ``x`` by way of the activation; in
        evaluation there is none.

        Args:
            inv_temperature: of ``p(c|x)``.
            return_loss_breakdown: also return ``(per_sample_entropy, batch_entropy, commitment)``,
                without their weights; in evaluation zeros.
            mask: bool ``[...]``: which vectors count in the losses. Of none they are 0.
        """
        x = self._enter("x", x)
        dtype = x.dtype
        x = x.to(compute_dtype(x))
        if self.soft_clamp_input_value is not None:
            x = torch.tanh(x / self.soft_clamp_input_value) * self.soft_clamp_input_value
        if self.spherical:
            x = F.normalize(x, dim=-1) * self.codebook_scale
        positive = x > 0
        codes = (2 * positive.to(x.dtype) - 1) * self._magnitude
        indices = self._of_codebooks((positive * self.mask).sum(-1))
        weight = self._weights(mask, x)
        losses = LFQLosses(*[x.new_zeros(()) for _ in LFQLosses._fields])
        quantized = codes
        if self.training:
            losses = self._losses(x, codes, weight, inv_temperature, return_loss_breakdown)
            quantized = straight_through(self.activation(x), codes)
        entropy = losses.per_sample_entropy - self.diversity_gamma * losses.batch_entropy
        loss = entropy * self.entropy_loss_weight + losses.commitment * self.commitment_loss_weight
        output = LFQOutput(self._leave(quantized.to(dtype)), indices, loss)
        return (output, losses) if return_loss_breakdown else output

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, codebook_size={self.codebook_size}, "
            f"num_codebooks={self.num_codebooks}"
        )
