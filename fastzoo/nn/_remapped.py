"""Indices of the codes that are used, in the place of those of all codes."""

import os

import numpy as np
import torch
from torch import Tensor, nn


class Remapped(nn.Module):
    """A quantiser of ``codes`` codes, of which only some are used, as taming-transformers has it.

    Args:
        codes: how many codes there are.
        remap: the file (``.npy``) or tensor of the used codes, all different; None uses all.
        unknown_index: what other codes become: ``random``, any used one; ``extra``, one index more
            than there are used codes; or a number.

    Attributes:
        used: int64, a buffer, the used codes; only where there is a ``remap``.
        re_embed: how many indices there are after it.
    """

    used: Tensor

    def __init__(
        self,
        codes: int,
        remap: str | os.PathLike[str] | Tensor | None,
        unknown_index: str | int,
    ) -> None:
        super().__init__()
        self.remap = remap
        self.re_embed = codes
        self.unknown_index = unknown_index
        if remap is None:
            return
        if not isinstance(unknown_index, int) and unknown_index not in ("random", "extra"):
            raise ValueError(
                f"unknown_index: expected 'random', 'extra' or a number, got {unknown_index!r}"
            )
        used = remap if isinstance(remap, Tensor) else torch.from_numpy(np.load(remap))
        used = used.detach().clone().long()
        different = used.dim() == 1 and len(used) > 0 and len(used.unique()) == len(used)
        if not different or used.min() < 0 or used.max() >= codes:
            raise ValueError(
                f"remap: expected different indices below {codes}, got {used.numel()} of "
                f"shape {list(used.shape)}"
            )
        self.register_buffer("used", used)
        self.re_embed = len(used)
        if unknown_index == "extra":
            self.unknown_index = self.re_embed
            self.re_embed += 1

    def _check_remap(self) -> None:
        if self.remap is None:
            raise RuntimeError("remap: expected the used codes at construction, got None")

    def remap_to_used(self, indices: Tensor) -> Tensor:
        """Where each code is among the used ones, ``unknown_index`` if it is not."""
        self._check_remap()
        ordered, order = self.used.sort()
        place = torch.searchsorted(ordered, indices).clamp_max(len(ordered) - 1)
        if isinstance(self.unknown_index, str):
            unknown = torch.randint_like(indices, len(ordered))
        else:
            unknown = torch.full_like(indices, self.unknown_index)
        return torch.where(ordered[place] == indices, order[place], unknown)

    def unmap_to_all(self, indices: Tensor) -> Tensor:
        """The codes of indices among the used ones; the extra one is the first of them."""
        self._check_remap()
        if self.re_embed > len(self.used):
            indices = torch.where(indices >= len(self.used), 0, indices)
        return self.used[indices]
