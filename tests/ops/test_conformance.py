"""Every operator, every backend that it has, every check."""

import pytest

from fastzoo.ops._operator import OPERATORS
from fastzoo.testing import SPECS
from fastzoo.testing.conformance import checks_on
from tests.conftest import DEVICE


@pytest.mark.parametrize("check", checks_on(DEVICE))
@pytest.mark.parametrize(
    ("name", "backend"),
    [
        (name, backend)
        for name in SPECS
        for backend in OPERATORS[SPECS[name].operator].has
        if not (backend == "cpu" and DEVICE == "cuda")
    ],
)
def test_conformance(name: str, backend: str, check: str) -> None:
    # A backend that cannot run here fails the test rather than skipping it.
    assert OPERATORS[SPECS[name].operator].refusal(backend, DEVICE) is None
    checks_on(DEVICE)[check](SPECS[name], backend, DEVICE)
