"""A codebook's tensors and what training does to them."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastzoo import ops
from fastzoo.ops._collectives import Batch, sum_over, world
from fastzoo.ops.vq import average_
from fastzoo.reference.precision import compute_dtype


class Codebook(nn.Module):
    """The codes of all heads and their running statistics, named as checkpoints have them."""

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        num_codebooks: int,
        *,
        kmeans_init: bool,
        kmeans_iters: int,
        decay: float,
        eps: float,
        threshold_ema_dead_code: float,
        learnable: bool,
        cosine: bool,
        sync: bool | None,
    ) -> None:
        super().__init__()
        self.kmeans_iters = kmeans_iters
        self.decay = decay
        self.eps = eps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        self.cosine = cosine
        self.sync = sync
        embed = torch.zeros(num_codebooks, codebook_size, dim)
        if not kmeans_init:
            nn.init.kaiming_uniform_(embed)
            embed = self.normalized(embed)
        self.register_buffer("initted", torch.tensor(not kmeans_init))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, codebook_size))
        self.register_buffer("embed_avg", embed.clone())
        if learnable:
            self.embed = nn.Parameter(embed)
        else:
            self.register_buffer("embed", embed)
        # What the buffer says, known without waiting for the device.
        self.ready = not kmeans_init

    def _apply(self, fn: Any, recurse: bool = True) -> "Codebook":
        # In half precision a running average stands still where a step is below its rounding.
        wide = {name: getattr(self, name) for name in ("cluster_size", "embed_avg")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in wide.items():
            moved = getattr(self, name)
            if compute_dtype(moved) != moved.dtype:
                setattr(self, name, value.to(moved.device))
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.ready = not self.initted.is_meta and bool(self.initted)

    @property
    def metric(self) -> str:
        return "dot" if self.cosine else "l2"

    def normalized(self, vectors: Tensor) -> Tensor:
        """The vectors as they are compared: of length 1 for the cosine."""
        return F.normalize(vectors, dim=-1, eps=1e-6) if self.cosine else vectors

    def over_ranks(self, value: Tensor) -> Tensor:
        return value if self.sync is False else sum_over(value, None)

    @torch.no_grad()
    def track_(self, counts: Tensor, sums: Tensor) -> None:
        """Enter the statistics of a batch, and leave the codes as they are."""
        average_(self.cluster_size, self.embed_avg, counts, sums, self.decay)

    @torch.no_grad()
    def move_(self, counts: Tensor, sums: Tensor, decay: float) -> None:
        """Enter the statistics of a batch, and move the codes to them."""
        embed = self.embed.detach()
        running = embed, self.cluster_size, self.embed_avg
        ops.vq_ema_update_(*running, counts, sums, decay=decay, eps=self.eps)
        if self.cosine:
            embed.copy_(self.normalized(embed))

    def refresh_(self) -> None:
        """Move the codes to the statistics as they stand."""
        self.move_(self.cluster_size, self.embed_avg, decay=1.0)

    @torch.no_grad()
    def replace_dead_(self, rows: Tensor, mask: Tensor | None) -> None:
        """Put vectors of the batch ``rows [N, H, D]`` in the place of codes that are hardly used.

        Of more dead codes than vectors, the first are replaced. No shape depends on the data, and
        nothing waits for the device.
        """
        threshold = self.threshold_ema_dead_code
        dead = self.cluster_size < threshold
        drawn, found = self._draw(rows, mask, dead.cumsum(1) - 1)
        replaced = (dead & found)[..., None]
        drawn = drawn.to(self.embed.dtype)
        self.embed.detach().copy_(torch.where(replaced, drawn, self.embed))
        self.embed_avg.copy_(torch.where(replaced, drawn * threshold, self.embed_avg))
        self.cluster_size.masked_fill_(replaced[..., 0], threshold)

    def _draw(self, rows: Tensor, mask: Tensor | None, places: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors out of the batches of all ranks, drawn by lot, the same on every rank.

        Of head h, code k has the vector that was drawn at place ``places[h, k]``, and whether there
        was one: no vector is drawn twice.
        """
        n, heads, _ = rows.shape
        codes = places.shape[1]
        rank, ranks = (0, 1) if self.sync is False else world(None)
        if n == 0:
            rows = rows.new_zeros(1, *rows.shape[1:])
        lots = torch.rand(heads, n, device=rows.device)
        if mask is not None:
            lots = lots.masked_fill(~mask, -1.0)
        # A rank may win all places, and none beyond them.
        lots, own = lots.sort(dim=1, descending=True, stable=True)
        missing = (0, max(0, codes - n))
        lots, own = F.pad(lots[:, :codes], missing, value=-1.0), F.pad(own[:, :codes], missing)
        lots = Batch(None, rank, (heads,) * ranks).gather(lots)
        lots = lots.view(ranks, heads, codes).transpose(0, 1).flatten(1)
        lots, winners = lots.sort(dim=1, descending=True, stable=True)
        places = places.clamp(0, codes - 1)
        found = lots.gather(1, places) >= 0
        winner = winners.gather(1, places)
        head = torch.arange(heads, device=rows.device)[:, None]
        drawn = rows[own.gather(1, winner % codes), head]
        if ranks > 1:
            mine = found & (winner // codes == rank)
            drawn = sum_over(torch.where(mine[..., None], drawn, 0), None)
        return drawn, found

    @torch.no_grad()
    def initialize_(self, rows: Tensor, mask: Tensor | None) -> None:
        """The first codes, by k-means over the vectors ``rows [N, H, D]`` of all ranks.

        All heads at once, and on the sphere for the cosine; :func:`fastzoo.ops.kmeans` has one
        process's vectors, and takes a pass for each first centroid.
        """
        if bool(self.initted):
            self.ready = True
            return
        heads, codes, _ = self.embed.shape
        here = mask.sum() if mask is not None else torch.tensor(len(rows), device=rows.device)
        number = int(self.over_ranks(here))
        if number == 0:
            raise ValueError("x: expected vectors for k-means to initialise the codebook, got none")
        places = torch.arange(codes, device=rows.device) % number
        means, _ = self._draw(rows, mask, places.expand(heads, codes))
        for _ in range(self.kmeans_iters):
            found = ops.vq_quantize(
                rows, means, metric=self.metric, mask=mask, estimator="none", return_stats=True
            )
            counts, sums = self.over_ranks(found.counts), self.over_ranks(found.sums)
            used = counts[..., None]
            means = torch.where(used > 0, self.normalized(sums / used.clamp(min=1)), means)
        self.embed.detach().copy_(means)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(means * used)
        self.initted.fill_(True)
        self.ready = True
