"""Codebooks that training moves: one quantiser, and a chain of them over residuals."""

import math
import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.nn._codebook import Codebook
from fastzoo.nn._state import updates_state
from fastzoo.ops._checks import check_floating, check_tensor
from fastzoo.ops._collectives import sum_over, world
from fastzoo.reference.precision import compute_dtype

# Arguments of vector_quantize_pytorch that are not here: what stands for "unused", and what to do.
_MATRIX = "it needs the distances to all codes, an N x K matrix"
_SAMPLING = "for sampled codes use fastzoo.nn.GumbelVQ"
_OPTIMIZER = "give the codebook, learnable_codebook=True, to the model's optimizer"
_REFUSED: dict[str, tuple[Any, str]] = {
    "commitment_use_cross_entropy_loss": (False, _MATRIX),
    "codebook_diversity_loss_weight": (0.0, _MATRIX),
    "codebook_diversity_temperature": (100.0, _MATRIX),
    "stochastic_sample_codes": (False, _SAMPLING),
    "sample_codebook_temp": (1.0, _SAMPLING),
    "straight_through": (False, f"{_SAMPLING}; rotation_trick=False is plain straight-through"),
    "directional_reparam": (False, "use rotation_trick"),
    "directional_reparam_variance": (5e-3, "use rotation_trick"),
    "sync_affine_param": (False, "normalise the input instead"),
    "affine_param": (False, "normalise the input instead"),
    "affine_param_batch_decay": (0.99, "normalise the input instead"),
    "affine_param_codebook_decay": (0.9, "normalise the input instead"),
    "vq_bridge": (None, "use fastzoo.nn.SimVQ"),
    "in_place_codebook_optimizer": (None, _OPTIMIZER),
    "manual_in_place_optimizer_update": (False, _OPTIMIZER),
    "sync_update_v": (0.0, _OPTIMIZER),
    "diveq": (False, "use rotation_trick"),
    "implicit_neural_codebook": (False, "each vector would have codes of its own"),
    "mlp_kwargs": ({}, "each vector would have codes of its own"),
    "beam_size": (None, "each stage takes the nearest code"),
    "eval_beam_size": (None, "each stage takes the nearest code"),
    "beam_score_quantizer_weights": (None, "each stage takes the nearest code"),
    "topk": (None, "use fastzoo.ops.vq_nearest(..., k=) with the codebook"),
    "indices": (None, f"cross entropy to given codes: {_MATRIX}"),
    "return_loss_breakdown": (False, "the loss is returned whole"),
    "codebook_transform_fn": (None, "each vector would have codes of its own"),
    "ema_update_weight": (None, "use fastzoo.ops.vq_ema_update_"),
    "accum_ema_update": (False, "use fastzoo.ops.vq_ema_update_"),
}
_IN_CALLS = {"sample_codebook_temp": None}


def _refuse(arguments: dict[str, Any], unused: dict[str, Any] | None = None) -> None:
    for name, value in arguments.items():
        if name not in _REFUSED:
            raise TypeError(f"unexpected keyword argument {name!r}")
        default, instead = _REFUSED[name]
        default = (unused or {}).get(name, default)
        if value is not default and (isinstance(value, Tensor) or value != default):
            raise ValueError(f"{name}: only {default!r} is supported, {instead}")


def _gather(codebook: Tensor, indices: Tensor) -> Tensor:
    """Codes ``[..., D]`` of ``[K, D]``, zeros for index -1."""
    codes = F.embedding(indices.clamp(min=0), codebook)
    return codes.masked_fill((indices < 0)[..., None], 0)


def _out_of_map(x: Tensor) -> Tensor:
    """Channels from behind the batch to the end."""
    return x.movedim(1, -1).contiguous()


class _Quantizer(nn.Module):
    """What one quantiser and a chain of them share: projections, layouts and masks around them."""

    def __init__(
        self,
        dim: int,
        width: int,
        *,
        layernorm: bool,
        channel_last: bool,
        accept_image_fmap: bool,
        accept_3d_fmap: bool,
        return_zeros_for_masked_padding: bool,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.has_projections = width != dim
        self.project_in: nn.Module = nn.Identity()
        self.project_out: nn.Module = nn.Identity()
        if self.has_projections:
            linear = nn.Linear(dim, width)
            self.project_in = nn.Sequential(linear, nn.LayerNorm(width)) if layernorm else linear
            self.project_out = nn.Linear(width, dim)
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

    @property
    def _maps(self) -> bool:
        return not self.channel_last or self.accept_image_fmap or self.accept_3d_fmap

    def _tokens(
        self, x: Tensor, mask: Tensor | None, lens: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The input with its channels last, and the mask."""
        check_tensor("x", x, "[..., dim]", -1)
        check_floating("x", x)
        rank = 4 if self.accept_image_fmap else 5 if self.accept_3d_fmap else x.dim()
        channels = 1 if self._maps and x.dim() > 2 else -1
        if x.dim() != rank or x.dim() < 2 or x.shape[channels] != self.dim:
            shape = f"[batch, {self.dim}, ...]" if self._maps else f"[..., {self.dim}]"
            wanted = f" of {rank} dimensions" if rank != x.dim() else ""
            raise ValueError(f"x: expected {shape}{wanted}, got {list(x.shape)}")
        tokens = x if channels == -1 else _out_of_map(x)
        if lens is not None:
            if mask is not None:
                raise ValueError("mask, lens: expected at most one of them")
            mask = torch.arange(tokens.shape[1], device=x.device) < lens[:, None]
        if mask is not None and mask.shape != tokens.shape[:-1]:
            raise ValueError(f"mask: expected {list(tokens.shape[:-1])}, got {list(mask.shape)}")
        return tokens, mask

    def _output(self, quantized: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """The codes as they leave the module: projected, masked, and in the input's layout."""
        quantized = self.project_out(quantized.to(tokens.dtype))
        if mask is not None:
            padding = 0 if self.return_zeros_for_masked_padding else tokens
            quantized = torch.where(mask[..., None], quantized, padding)
        return self._layout(quantized)

    def _layout(self, tokens: Tensor) -> Tensor:
        return tokens.movedim(-1, 1) if self._maps and tokens.dim() > 2 else tokens


class VectorQuantize(_Quantizer):
    """Quantise vectors to a codebook that exponential moving averages or gradients move.

    The arguments, names and order are those of vector_quantize_pytorch's ``VectorQuantize``, whose
    ``state_dict`` loads; one that is not supported raises and says what to use. Nothing of size
    N x K is kept.

    Args:
        dim: of the input.
        codebook_size: codes of a codebook.
        codebook_dim: of the codes; where ``heads * codebook_dim`` is not ``dim``, linear maps lead
            in and out. None: ``dim``.
        heads: a vector's parts of ``codebook_dim`` that are quantised each on its own.
        separate_codebook_per_head: a codebook for each head instead of one for all.
        decay, eps: of the moving averages.
        freeze_codebook: leave the codebook as it is in training; a call may say otherwise.
        kmeans_init, kmeans_iters: start from k-means over the first batch, of all ranks.
        use_cosine_sim: normalise vectors and codes.
        layernorm_after_project_in: after the linear map that leads in.
        threshold_ema_dead_code: codes with a smaller running count are replaced by vectors of the
            batch; 0 for none.
        channel_last: False for ``[batch, dim, ...]``.
        accept_image_fmap, accept_3d_fmap: for ``[batch, dim, height, width]``, and with depth.
        commitment_weight: of the loss that draws vectors to their codes.
        orthogonal_reg_weight, orthogonal_reg_active_codes_only, orthogonal_reg_max_codes: a loss
            that turns codes away from each other; of those chosen in the batch, and of at most
            so many drawn at random.
        rotation_trick: gradients through the rotation that maps a vector to its code; False is
            straight-through. None: where ``dim`` is above 1.
        sync_codebook: False keeps the statistics of each rank to itself; otherwise they are those
            of all ranks.
        ema_update: move the codebook by moving averages. None: unless it is learnable.
        manual_ema_update: only count, and leave the codes.
        learnable_codebook: a parameter, which the loss draws to its vectors.
        return_zeros_for_masked_padding: False returns masked vectors as they came.
        route_gradients_to_input: False stops the output's gradient at the codes.
        precision: ``exact`` or ``fast``, see :func:`fastzoo.ops.vq_quantize`.

    A step quantises first and updates the codebook afterwards, so indices, output and loss belong
    to one codebook. A forward that activation checkpointing runs again does not update,
    but sees the codebook as it has moved.

    Source: van den Oord et al., Neural Discrete Representation Learning (2017).
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        precision: str = "exact",
        **unsupported: Any,
    ) -> None:
        _refuse(unsupported)
        learns = bool(learnable_codebook)
        ema_update = not learns if ema_update is None else ema_update
        if not sync_kmeans and kmeans_init:
            raise ValueError("sync_kmeans: only True is supported, or codebooks differ per rank")
        if learns and ema_update:
            raise ValueError("learnable_codebook: expected False with ema_update")
        if learns and use_cosine_sim:
            raise ValueError("learnable_codebook: expected False with use_cosine_sim")
        if orthogonal_reg_active_codes_only and separate_codebook_per_head and heads > 1:
            raise ValueError(
                "orthogonal_reg_active_codes_only: expected False with separate_codebook_per_head"
            )
        codebook_dim = dim if codebook_dim is None else codebook_dim
        sizes = {"dim": dim, "codebook_size": codebook_size, "codebook_dim": codebook_dim}
        for name, value in {**sizes, "heads": heads, "kmeans_iters": kmeans_iters}.items():
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        super().__init__(
            dim,
            heads * codebook_dim,
            layernorm=layernorm_after_project_in,
            channel_last=channel_last,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
            return_zeros_for_masked_padding=return_zeros_for_masked_padding,
        )
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.freeze_codebook = freeze_codebook
        self.commitment_weight = commitment_weight
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.use_cosine_sim = use_cosine_sim
        self.ema_update = ema_update
        self.manual_ema_update = manual_ema_update
        self.learnable_codebook = learns
        self.route_gradients_to_input = route_gradients_to_input
        self.precision = precision
        self._codebook = Codebook(
            codebook_dim,
            codebook_size,
            heads if separate_codebook_per_head else 1,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            learnable=learns or orthogonal_reg_weight > 0,
            cosine=use_cosine_sim,
            sync=sync_codebook,
        )

    @property
    def codebook(self) -> Tensor:
        """The codes ``[K, D]``, or ``[H, K, D]`` where heads have their own."""
        embed = self._codebook.embed
        return embed if self.separate_codebook_per_head else embed[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        with torch.no_grad():
            self._codebook.embed.copy_(codes.view_as(self._codebook.embed))

    def forward(
        self,
        x: Tensor,
        indices: None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: None = None,
        sample_codebook_temp: None = None,
        freeze_codebook: bool | None = None,
        *,
        ema_update: bool | None = None,
        **unsupported: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Quantise ``x``: ``(quantized, indices, loss)``.

        Args:
            x: ``[batch, n, dim]`` or any ``[..., dim]``; or a map, as the module was told. Half
                precision is computed in float32.
            mask: bool, the shape of ``x`` without channels: where it is false the index is -1, and
                the vector counts nowhere.
            lens: instead of a mask, how many vectors of each sequence count.
            freeze_codebook, ema_update: instead of what the module was told.

        Returns:
            ``quantized`` like ``x``; int64 indices in its shape without channels, with heads at the
            end; the loss, 0 in evaluation.
        """
        given = {"indices": indices, "topk": topk, "sample_codebook_temp": sample_codebook_temp}
        _refuse({**given, **unsupported}, _IN_CALLS)
        tokens, mask = self._tokens(x, mask, lens)
        quantized, chosen, loss = self._quantize(
            self.project_in(tokens),
            mask,
            routes=x.requires_grad,
            freeze=self.freeze_codebook if freeze_codebook is None else freeze_codebook,
            ema_update=ema_update,
        )
        return self._output(quantized, tokens, mask), chosen, loss

    def _quantize(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        *,
        routes: bool,
        freeze: bool,
        ema_update: bool | None = None,
        replaces: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, indices and loss of vectors ``[..., heads * codebook_dim]``, in the precision that
        codes are compared in. ``routes``: gradients go on to what the vectors were made of."""
        book = self._codebook
        separate = self.separate_codebook_per_head and self.heads > 1
        rows = tokens.to(compute_dtype(book.embed))
        if self.heads > 1:
            rows = rows.unflatten(-1, (self.heads, -1))
            if mask is not None and not separate:
                mask = mask[..., None].expand(rows.shape[:-1])
        rows = book.normalized(rows)
        if not book.ready:
            # Not as a decorator, which imports the compiler with fastzoo.
            torch.compiler.disable(book.initialize_)(*self._flat(rows, mask))

        trains = self.training and not freeze
        moves = self.ema_update if ema_update is None else ema_update
        counted = moves or book.threshold_ema_dead_code > 0
        counts_codes = counted and trains and updates_state(self)
        weight = max(0.0, self.commitment_weight) if self.training else 0.0
        learns = self.learnable_codebook and trains
        regularizes = self.orthogonal_reg_weight > 0 and self.training
        estimator = "rotation" if self.rotation_trick else "ste"
        if not (self.training and routes and self.route_gradients_to_input):
            estimator = "none"
        if weight == 0 and estimator == "none":
            rows = rows.detach()
        codes = book.embed.to(rows.dtype)
        if not (learns or estimator == "none"):
            codes = codes.detach()
        elif counts_codes and codes.requires_grad:
            # The backward reads them, after the dead ones were replaced.
            codes = codes.clone()
        result = ops.vq_quantize(
            rows,
            codes if separate else codes[0],
            beta=weight,
            codebook_weight=weight if learns else 0.0,
            estimator=estimator,
            metric=book.metric,
            mask=mask,
            precision=self.precision,
            return_stats=counts_codes or (regularizes and self.orthogonal_reg_active_codes_only),
        )
        loss = result.loss if weight > 0 else rows.new_zeros(())
        if weight > 0 and learns:
            # One distance, which draws both its ends.
            loss = loss - loss.detach() / 2
        if counts_codes:
            counts = book.over_ranks(result.counts.view_as(book.cluster_size))
            sums = book.over_ranks(result.sums.view_as(book.embed_avg))
            if moves and not self.manual_ema_update:
                book.move_(counts, sums, book.decay)
            else:
                book.track_(counts, sums)
            if replaces and book.threshold_ema_dead_code > 0:
                book.replace_dead_(*self._flat(rows.detach(), mask))
        if regularizes:
            loss = loss + self.orthogonal_reg_weight * self._orthogonality(result.counts)
        quantized = result.quantized
        return quantized.flatten(-2) if self.heads > 1 else quantized, result.indices, loss

    def _flat(self, rows: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Vectors ``[N, H, D]`` for a codebook of H heads, and their mask."""
        heads, _, dim = self._codebook.embed.shape
        return rows.reshape(-1, heads, dim), None if mask is None else mask.reshape(-1)

    def _orthogonality(self, counts: Tensor) -> Tensor:
        """The mean squared cosine of two codes, less what a code has with itself."""
        codes = F.normalize(self._codebook.embed, dim=-1, eps=1e-6)
        heads, number, _ = codes.shape
        total: Tensor | int = number
        active = counts > 0 if self.orthogonal_reg_active_codes_only else None
        most = self.orthogonal_reg_max_codes
        if most is not None and most < number:
            lots = torch.rand(number, device=codes.device)
            if active is not None:
                lots = lots.masked_fill(~active, -1.0)
            lots, drawn = lots.topk(most)
            codes = codes[:, drawn]
            active, total = (lots >= 0 if active is not None else None), most
        if active is not None:
            codes, total = torch.where(active[:, None], codes, 0), active.sum()
        # All cosines' squares add up to those of the D x D matrix.
        gram = torch.einsum("hkd,hke->hde", codes, codes)
        return gram.square().sum() / (heads * total * total) - 1 / total

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices as :meth:`forward` returns them, in its layout; zeros for -1."""
        return self._layout(self._codes(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` returned with these indices."""
        return self._layout(self.project_out(self._codes(indices)))

    def _codes(self, indices: Tensor) -> Tensor:
        embed = self._codebook.embed
        if self.heads == 1:
            return _gather(embed[0], indices)
        if self.separate_codebook_per_head:
            first = torch.arange(0, self.heads, device=indices.device) * self.codebook_size
            indices = torch.where(indices < 0, -1, indices + first)
        return _gather(embed.flatten(0, 1), indices).flatten(-2)

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.codebook_size}, heads={self.heads}"


class ResidualVQ(_Quantizer):
    """Quantise vectors in stages, each stage what the one before left over.

    The arguments and names are those of vector_quantize_pytorch's ``ResidualVQ``, whose
    ``state_dict`` loads; one that is not supported raises and says what to use.

    Args:
        dim, codebook_dim: as :class:`VectorQuantize` has them; the linear maps are around the
            stages.
        codebook_size: of each stage, or a tuple of them.
        num_quantizers: stages; None: the length of that tuple.
        shared_codebook: one codebook for all stages. It counts in every stage and moves once
            all are through, so training and evaluation quantise alike.
        quantize_dropout: in training leave out the last stages from one drawn at random, not
            before ``quantize_dropout_cutoff_index``, in steps of ``quantize_dropout_multiple_of``:
            index -1 and loss 0. The draw is made on the host.
        quant_grad_frac: how much of the later stages' gradient reaches a stage's output.
        channel_last, accept_image_fmap, accept_3d_fmap, return_zeros_for_masked_padding, options:
            as :class:`VectorQuantize` has them; not heads.

    Source: Zeghidour et al., SoundStream (2021), algorithm 1.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        quant_grad_frac: float = 0.0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ) -> None:
        if heads != 1:
            raise ValueError(f"heads: expected 1, got {heads}")
        if isinstance(codebook_size, tuple):
            sizes = codebook_size
        elif num_quantizers is None:
            raise ValueError("num_quantizers: expected a number, or a tuple of codebook_size")
        else:
            sizes = (codebook_size,) * num_quantizers
        if num_quantizers not in (None, len(sizes)) or not sizes:
            raise ValueError(f"num_quantizers: expected {len(sizes)}, got {num_quantizers}")
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError("shared_codebook: expected one codebook_size for all stages")
        if not 0 <= quantize_dropout_cutoff_index < len(sizes):
            raise ValueError(
                f"quantize_dropout_cutoff_index: expected 0 to {len(sizes) - 1}, "
                f"got {quantize_dropout_cutoff_index}"
            )
        codebook_dim = dim if codebook_dim is None else codebook_dim
        super().__init__(
            dim,
            codebook_dim,
            layernorm=False,
            channel_last=channel_last,
            accept_image_fmap=accept_image_fmap,
            accept_3d_fmap=accept_3d_fmap,
            return_zeros_for_masked_padding=return_zeros_for_masked_padding,
        )
        if shared_codebook:
            options["manual_ema_update"] = True
        self.num_quantizers = len(sizes)
        self.codebook_sizes = sizes
        self.shared_codebook = shared_codebook
        self.quantize_dropout = quantize_dropout and len(sizes) > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of
        self.quant_grad_frac = quant_grad_frac
        self.layers = nn.ModuleList(VectorQuantize(codebook_dim, size, **options) for size in sizes)
        if shared_codebook:
            for layer in self._stages[1:]:
                layer._codebook = self._stages[0]._codebook

    @property
    def _stages(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def codebook_size(self) -> int:
        return self.codebook_sizes[0]

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """The codes ``[stages, K, D]``; a tuple of them where sizes differ."""
        codebooks = tuple(stage.codebook.view(-1, stage.dim) for stage in self._stages)
        return torch.stack(codebooks) if len(set(self.codebook_sizes)) == 1 else codebooks

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: None = None,
        freeze_codebook: bool | None = None,
        beam_size: None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantise ``x``: ``(quantized, indices, losses)``.

        Args:
            x, mask, freeze_codebook: as :class:`VectorQuantize` has them.
            return_all_codes: also return the codes of each stage ``[stages, ..., D]``.
            rand_quantize_dropout_fixed_seed: decides which stages are left out.

        Returns:
            ``quantized`` like ``x``; indices in its shape without channels and with the stages at
            the end; a loss for each stage.
        """
        refused = {"indices": indices, "beam_size": beam_size}
        _refuse({**refused, "sample_codebook_temp": sample_codebook_temp}, _IN_CALLS)
        tokens, mask = self._tokens(x, mask, None)
        last = self._last_stage(x.device, rand_quantize_dropout_fixed_seed)
        first = self._stages[0]
        freeze = first.freeze_codebook if freeze_codebook is None else freeze_codebook
        inputs: list[Tensor] = []
        found: list[Tensor] = []
        losses: list[Tensor] = []
        residual = self.project_in(tokens)
        residual = residual.to(compute_dtype(first.codebook))
        total: Tensor | None = None
        for number, stage in enumerate(self._stages[: last + 1]):
            if self.shared_codebook:
                inputs.append(residual.detach())
            quantized, chosen, loss = stage._quantize(
                residual,
                mask,
                routes=residual.requires_grad,
                freeze=freeze,
                replaces=not self.shared_codebook,
            )
            total = quantized if total is None else total + quantized
            found.append(chosen)
            losses.append(loss)
            if number < last:
                residual = residual - self._passed_on(quantized)
        assert total is not None
        if self.shared_codebook and not freeze and updates_state(self):
            self._move_shared(inputs, mask)
        left_out = self.num_quantizers - 1 - last
        all_indices = F.pad(torch.stack(found, -1), (0, left_out), value=-1)
        all_losses = F.pad(torch.stack(losses), (0, left_out))
        results = self._output(total, tokens, mask), all_indices, all_losses
        return (*results, self.get_codes_from_indices(all_indices)) if return_all_codes else results

    def _passed_on(self, quantized: Tensor) -> Tensor:
        """What a stage took away, with the share of its gradient that goes on."""
        share = self.quant_grad_frac
        stopped = quantized.detach()
        return stopped if share <= 0 else torch.lerp(stopped, quantized, share)

    def _last_stage(self, device: torch.device, seed: int | None) -> int:
        most = self.num_quantizers - 1
        if not (self.training and self.quantize_dropout):
            return most
        if seed is None:
            # Ranks draw alike, and one process alone does not wait for its device.
            place = device if world(None)[1] > 1 else "cpu"
            seed = int(sum_over(torch.randint(2**31, (), device=place), None))
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, most + 1)
        step = self.quantize_dropout_multiple_of
        return min(most, math.ceil((last + 1) / step) * step - 1)

    def _move_shared(self, inputs: list[Tensor], mask: Tensor | None) -> None:
        first = self._stages[0]
        book = first._codebook
        if first.ema_update:
            book.refresh_()
        if book.threshold_ema_dead_code > 0:
            every = None if mask is None else mask.expand(len(inputs), *mask.shape)
            book.replace_dead_(*first._flat(book.normalized(torch.stack(inputs)), every))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes ``[stages, ..., D]`` of indices ``[..., stages]``, channels last; zeros for -1
        and for stages at the end that are not given."""
        given = [_gather(*pair) for pair in self._pairs(indices)]
        missing = self.num_quantizers - len(given)
        return torch.stack(given + [torch.zeros_like(given[0])] * missing)

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What :meth:`forward` returned with these indices, channels last."""
        total: Tensor | None = None
        for pair in self._pairs(indices):
            codes = _gather(*pair)
            total = codes if total is None else total + codes
        result: Tensor = self.project_out(total)
        return result

    def _pairs(self, indices: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Each stage's codes, and the indices into them."""
        given = indices.shape[-1]
        if not 1 <= given <= self.num_quantizers:
            raise ValueError(
                f"indices: expected [..., {self.num_quantizers}] or fewer stages, "
                f"got {list(indices.shape)}"
            )
        stages = self._stages[:given]
        return [(s._codebook.embed[0], i) for s, i in zip(stages, indices.unbind(-1), strict=True)]

    def extra_repr(self) -> str:
        return f"{self.dim}, stages={self.num_quantizers}"
