"""Sampler steps as sums of tensors: a formula written on names becomes a row of coefficients.

Every step of every method is linear in its tensors. Here a tensor is a name, ``x + 2 * eps`` is a
:class:`Combination`, and its coefficients are float64 numbers on the host (or one a sample). A
:class:`Program` is what one call of :func:`fastzoo.ops.ode_step` computes; :class:`Tables` are
those of a whole run, on the device since its beginning.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy
import torch
from torch import Tensor

from fastzoo import ops
from fastzoo.ops.ode_step import BOUND, DRAW, EARLIER, NOISE, ROWS, TENSORS, WIDTH

# One number for all samples, or a float64 array [B] with one for each.
Coefficient: TypeAlias = Any
# A tensor by its name, or a draw of noise by its number.
Term: TypeAlias = str | int


class Combination:
    """A sum of tensors, each times a coefficient."""

    # numpy leaves a product of its arrays with a combination to the combination.
    __array_ufunc__ = None

    def __init__(self, terms: Mapping[Term, Coefficient]) -> None:
        self.terms = {
            name: value
            for name, value in terms.items()
            if isinstance(value, numpy.ndarray) or value != 0
        }

    def __add__(self, other: "Combination") -> "Combination":
        if not isinstance(other, Combination):
            return NotImplemented
        terms = dict(self.terms)
        for name, value in other.terms.items():
            terms[name] = terms[name] + value if name in terms else value
        return Combination(terms)

    def __mul__(self, factor: Coefficient) -> "Combination":
        if isinstance(factor, Combination):
            return NotImplemented
        return Combination({name: value * factor for name, value in self.terms.items()})

    __rmul__ = __mul__

    def __truediv__(self, divisor: Coefficient) -> "Combination":
        return Combination({name: value / divisor for name, value in self.terms.items()})

    def __neg__(self) -> "Combination":
        return self * -1.0

    def __sub__(self, other: "Combination") -> "Combination":
        return self + -other

    def __repr__(self) -> str:
        return " + ".join(f"{value} {name}" for name, value in self.terms.items()) or "0"

    @property
    def noisy(self) -> bool:
        return any(isinstance(name, int) for name in self.terms)


def tensor(name: str) -> Combination:
    """The tensor of this name."""
    return Combination({name: 1.0})


def noise(draw: int) -> Combination:
    """The standard normal noise of this draw."""
    return Combination({draw: 1.0})


class Program:
    """One call of :func:`fastzoo.ops.ode_step`: rows of coefficients and the tensors they are of.

    Args:
        rows: what is computed, one to three combinations by name, in order; one may contain those
            before it by their names. Noise may stand in the last one, whose value is the result.
        like: the tensor whose dtype and shape the results have; it is the first one even where
            its coefficient is 0.
        keep: the names of the rows before the last one that are results too.
        bounds: rows before the last one that are clamped to ``[-bound, bound]``.
        scaled: tensors whose coefficients the call multiplies by ``factor``.
        draw: where there is no noise, the number of the draw by which a call may round.

    Raises:
        ValueError: more than eight tensors, noise but for one in the last row, a row with a
            tensor's name, a coefficient that is not finite.
    """

    def __init__(
        self,
        rows: Mapping[str, Combination],
        like: str,
        *,
        keep: Iterable[str] = (),
        bounds: Mapping[str, float] | None = None,
        scaled: Iterable[str] = (),
        draw: int = 0,
    ) -> None:
        names = list(rows)
        if like in names or any(
            term in names[r:] for r, row in enumerate(rows.values()) for term in row.terms
        ):
            raise ValueError(f"a row has the name of a tensor that is read: rows {names}")
        inputs = [like]
        for row in rows.values():
            inputs += [
                name
                for name in row.terms
                if isinstance(name, str) and name not in inputs and name not in names
            ]
        if len(inputs) > TENSORS:
            raise ValueError(f"a step reads at most {TENSORS} tensors, got {inputs}")
        if not 1 <= len(names) <= ROWS:
            raise ValueError(f"a step has 1 to {ROWS} rows, got {names}")
        noises = [name for name, row in rows.items() for term in row.terms if isinstance(term, int)]
        if noises not in ([], names[-1:]):
            raise ValueError(f"a step has one noise, in its last row, got it in {noises}")
        slots: dict[Term, int] = {name: slot for slot, name in enumerate(inputs)}
        sizes = {numpy.size(value) for row in rows.values() for value in row.terms.values()} | {1}
        table = numpy.zeros((max(sizes), len(names), WIDTH))
        table[:, :, BOUND] = numpy.inf
        table[:, -1, DRAW] = draw
        for r, (name, row) in enumerate(rows.items()):
            for term, value in row.terms.items():
                if not numpy.isfinite(value).all():
                    raise ValueError(f"{name}: the coefficient of {term} is {value}")
                if isinstance(term, int):
                    table[:, r, NOISE], table[:, r, DRAW] = value, term
                else:
                    table[:, r, slots[term]] = value
            if bounds and name in bounds:
                table[:, r, BOUND] = bounds[name]
            slots[name] = EARLIER + r
        self.names = tuple(names)
        self.inputs = tuple(inputs)
        self.keep_only(tuple(keep))
        self.scaled = tuple(inputs.index(name) for name in scaled)
        self.noisy = rows[names[-1]].noisy
        self.table = table

    def keep_only(self, keep: Sequence[str]) -> None:
        """These rows before the last one are results, and no others."""
        self.keep = tuple(self.names.index(name) for name in keep)

    def __call__(
        self, tensors: Mapping[str, Tensor], table: Tensor | None = None, **more: Any
    ) -> Any:
        """The last row's value of these tensors, and after it those kept; ``table`` is this
        program's, on the device, and ``more`` what :func:`fastzoo.ops.ode_step` takes."""
        if table is None:
            table = torch.from_numpy(self.table)[None].to(tensors[self.inputs[0]].device)
        return ops.ode_step(
            [tensors[name] for name in self.inputs],
            table,
            scaled=self.scaled,
            keep=self.keep,
            **more,
        )


class Tables:
    """The coefficients of the programs of a run, brought to a device once and together."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self.programs = tuple(programs)
        self._on: dict[torch.device, tuple[Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        """A table ``[1, Q, R, 13]`` for each program."""
        if device not in self._on:
            flat = numpy.concatenate([p.table.ravel() for p in self.programs] or [numpy.zeros(0)])
            # They outlive the inference mode that they may be wanted in.
            with torch.inference_mode(False):
                moved = torch.from_numpy(flat).to(device)
                parts = moved.split([p.table.size for p in self.programs])
                self._on[device] = tuple(
                    part.view(1, *p.table.shape)
                    for part, p in zip(parts, self.programs, strict=True)
                )
        return self._on[device]


def stacked(programs: Sequence[Program]) -> Tensor:
    """One table ``[S, Q, R, 13]`` of programs that read the same tensors into the same rows: for a
    step that is captured once and finds its row by a counter on the device."""
    first = programs[0]
    for program in programs:
        if (program.inputs, program.names) != (first.inputs, first.names):
            raise ValueError(
                f"expected steps alike, got {first.inputs} -> {first.names} and "
                f"{program.inputs} -> {program.names}"
            )
    return torch.from_numpy(numpy.stack([program.table for program in programs]))
