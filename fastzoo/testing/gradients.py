"""The gradient oracle: three views of one difference, because each hides what another shows."""

from torch import Tensor


def assert_gradient_close(
    actual: Tensor, expected: Tensor, *, rtol: float, cancelled: float = 0.0, name: str = ""
) -> None:
    """Compare a gradient with a float64 one.

    - elementwise: no entry off by more than ``rtol`` of the largest entry;
    - relative L2: ``|a - e| <= rtol |e|``, which bounds the error of the direction as well;
    - signed bias: the mean error is not above ``rtol`` of the mean magnitude, which catches a
      small systematic error that the others let pass.

    Args:
        actual: the gradient under test, any floating dtype.
        expected: the oracle, float64, the same shape.
        rtol: derived from the arithmetic: number of roundings times unit round-off.
        cancelled: the size of the terms whose difference an entry is. Where it exceeds the
            gradient itself, only the elementwise view is taken, relative to it.

    Raises:
        AssertionError: naming the view that failed.
    """
    assert actual.shape == expected.shape, f"{name}: shape {actual.shape}, not {expected.shape}"
    a, e = actual.detach().double().cpu().flatten(), expected.detach().double().cpu().flatten()
    assert a.isfinite().all(), f"{name}: not finite"
    if e.numel() == 0:
        return
    error, scale = a - e, e.abs().max()
    if cancelled > scale:
        worst = error.abs().max()
        assert worst <= rtol * cancelled, f"{name}: error {worst:.3e} > {rtol * cancelled:.1e}"
        return
    if scale == 0:
        assert error.abs().max() == 0, f"{name}: {error.abs().max():.3e} where zero is right"
        return
    worst = error.abs().max() / scale
    assert worst <= rtol, f"{name}: elementwise error {worst:.3e} of the largest entry > {rtol:.1e}"
    relative = error.norm() / e.norm()
    assert relative <= rtol, f"{name}: relative L2 error {relative:.3e} > {rtol:.1e}"
    bias = error.mean().abs() / e.abs().mean()
    assert bias <= rtol, f"{name}: signed bias {bias:.3e} > {rtol:.1e}"
