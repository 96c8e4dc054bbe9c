"""Which implementation runs: the three ways to force one, the reasons, and what auto does."""

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastzoo
from fastzoo import _native, backends
from fastzoo.ops._operator import OPERATORS
from tests.conftest import DEVICE, ROOT

BOXES = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [20, 20, 30, 30]])
SCORES = torch.tensor([0.5, 0.9, 0.1])
KEPT = [1, 2]


class Overloads(TorchDispatchMode):
    """The names of the fastzoo overloads that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastzoo":
            self.names.append(func._overloadname)
        return func(*args, **(kwargs or {}))


def overload_called(**kwargs: str) -> str:
    with Overloads() as overloads:
        assert fastzoo.ops.nms(BOXES, SCORES, 0.5, **kwargs).tolist() == KEPT
    (name,) = overloads.names
    return name


@pytest.fixture(autouse=True)
def nothing_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "forced", None)


def python(code: str, **variables: str) -> subprocess.CompletedProcess:
    """Run code in a process of its own, where neither emulator nor interpreter is loaded."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("FASTZOO_", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**kept, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


# ---- the ways to choose, and their precedence ----------------------------------------------------


def test_each_backend_is_an_overload_of_its_own() -> None:
    for backend in backends.NAMES:
        if OPERATORS["nms"].refusal(backend, "cpu") is None:
            assert overload_called(backend=backend) == backend
    assert overload_called() == "default"
    assert overload_called(backend="auto") == "default"


def test_use_backend_nests() -> None:
    with fastzoo.use_backend("reference"):
        assert overload_called() == "reference"
        with fastzoo.use_backend("cpu"):
            assert overload_called() == "cpu"
            with fastzoo.use_backend("auto"):
                assert overload_called() == "default"
            assert overload_called() == "cpu"
        assert overload_called() == "reference"
    assert overload_called() == "default"


def test_use_backend_is_undone_by_an_exception() -> None:
    def fail() -> None:
        with fastzoo.use_backend("cpu"), fastzoo.use_backend("reference"):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert overload_called() == "default"


def test_argument_goes_before_use_backend() -> None:
    with fastzoo.use_backend("cpu"):
        assert overload_called(backend="reference") == "reference"
        # None and auto follow what is forced around the call.
        assert overload_called(backend="auto") == "cpu"


def test_environment_forces_a_backend_and_use_backend_goes_before_it() -> None:
    code = "import fastzoo; from fastzoo import backends; print(backends.forced)\n"
    code += "with fastzoo.use_backend('auto'): print(backends.forced)"
    assert python(code, FASTZOO_BACKEND="reference").stdout.split() == ["reference", "None"]


# ---- what is refused, and the words --------------------------------------------------------------


def test_unknown_names_are_refused_everywhere() -> None:
    expected = r"expected auto or one of \('reference', 'cpu', 'cuda', 'triton'\)"
    with pytest.raises(ValueError, match=f"^backend: unknown 'metal', {expected}"):
        fastzoo.ops.nms(BOXES, SCORES, 0.5, backend="metal")
    with (
        pytest.raises(ValueError, match=f"^use_backend: unknown backend 'metal', {expected}"),
        fastzoo.use_backend("metal"),
    ):
        pass
    assert backends.forced is None
    done = python("import fastzoo", FASTZOO_BACKEND="metal")
    assert done.returncode != 0
    assert "FASTZOO_BACKEND: unknown backend 'metal', expected auto or one of" in done.stderr


@pytest.mark.parametrize(
    ("setting", "backend", "device", "reason"),
    [
        ({}, "reference", "mps", None),
        ({"cpu_missing": None}, "cpu", "cpu", None),
        ({"cpu_missing": None}, "cpu", "cuda", "it runs on cpu tensors, not on cuda"),
        ({"cpu_missing": "_C_cpu.so was not built"}, "cpu", "cpu", "_C_cpu.so was not built"),
        ({"emulator_loaded": True}, "cuda", "cpu", None),
        ({"emulator_loaded": False}, "cuda", "cpu", "it runs on cuda tensors, not on cpu"),
        ({"cuda_missing": None}, "cuda", "cuda", None),
        ({"cuda_missing": "built for CUDA 13.0"}, "cuda", "cuda", "built for CUDA 13.0"),
        ({"cuda_missing": None}, "cuda", "mps", "it runs on cuda tensors, not on mps"),
        ({"interpreted": True}, "triton", "cpu", None),
        ({"interpreted": False}, "triton", "cpu", "it runs on cuda tensors, not on cpu"),
        ({"_triton_missing": None}, "triton", "cuda", None),
        ({"_triton_missing": "triton is missing"}, "triton", "cuda", "triton is missing"),
        ({"_triton_missing": "triton is missing"}, "triton", "cpu", "triton is missing"),
    ],
)
def test_refusals_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
    setting: dict[str, object],
    backend: str,
    device: str,
    reason: str | None,
) -> None:
    for name, value in setting.items():
        monkeypatch.setattr(_native if hasattr(_native, name) else backends, name, value)
    assert backends.refusal(backend, device) == reason


def test_a_forced_backend_that_cannot_run_raises_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_native, "emulator_loaded", False)
    message = r"fastzoo\.ops\.nms: backend 'cuda' cannot run: it runs on cuda tensors, not on cpu"
    with pytest.raises(RuntimeError, match=message):
        fastzoo.ops.nms(BOXES, SCORES, 0.5, backend="cuda")
    with fastzoo.use_backend("cuda"), pytest.raises(RuntimeError, match=message):
        fastzoo.ops.nms(BOXES, SCORES, 0.5)


def test_an_operator_without_that_kernel_says_so() -> None:
    backward = OPERATORS["vq_nearest_backward"]
    assert backward.refusal("triton", "cuda") == "vq_nearest_backward has no triton kernel"


# torch can make PrivateUse1 a device whose tensors hold nothing; the reference is replaced, since
# this test is of who is called.
FOREIGN_DEVICE = """
import warnings, torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
_setup_privateuseone_for_python_backend("toy")
import fastzoo
from fastzoo.ops._operator import OPERATORS
OPERATORS["nms"]._reference = lambda *args: torch.tensor([args[0].device.type == "toy"])
def call():
    return fastzoo.ops.nms(
        torch._C._acc.create_empty_tensor((3, 4), torch.float32),
        torch._C._acc.create_empty_tensor((3,), torch.float32), 0.5)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert call().item() and call().item()
for warning in caught:
    print(warning.message)
"""


def test_auto_warns_once_when_a_device_gets_the_reference() -> None:
    done = python(FOREIGN_DEVICE)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("fastzoo.ops.nms runs the slow reference on toy: ")
    assert "cpu: it runs on cpu tensors, not on toy" in line
    assert "triton: " in line


def test_auto_on_the_cpu_never_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fastzoo.ops.nms(BOXES, SCORES, 0.5).tolist() == KEPT


# ---- compilers and transforms see the choice -----------------------------------------------------


@pytest.fixture
def graphs() -> Iterator[list[list[str]]]:
    torch._dynamo.reset()
    yield []
    torch._dynamo.reset()


def compiled(graphs: list[list[str]], backend: str | None):
    def keep(module, inputs):
        calls = [str(n.target) for n in module.graph.nodes if n.op == "call_function"]
        graphs.append([c for c in calls if "fastzoo" in c])
        return module.forward

    def function(x, codebook):
        return fastzoo.ops.vq_nearest(x, codebook, backend=backend)

    return torch.compile(function, backend=keep, fullgraph=True)


def test_compiled_graph_holds_the_chosen_overload(graphs: list[list[str]]) -> None:
    x, codebook = torch.randn(5, 3), torch.randn(4, 3)
    for backend in ("cpu", "reference"):
        compiled(graphs, backend)(x, codebook)
        assert graphs.pop() == [f"fastzoo.vq_nearest.{backend}"]
    compiled(graphs, None)(x, codebook)
    assert graphs.pop() == ["fastzoo.vq_nearest.default"]


def test_use_backend_recompiles_and_its_end_does_not(graphs: list[list[str]]) -> None:
    x, codebook = torch.randn(5, 3), torch.randn(4, 3)
    function = compiled(graphs, None)
    function(x, codebook)
    with fastzoo.use_backend("cpu"):
        function(x, codebook)
    function(x, codebook)
    assert graphs == [["fastzoo.vq_nearest.default"], ["fastzoo.vq_nearest.cpu"]]


def test_nms_compiles_to_its_overload(graphs: list[list[str]]) -> None:
    def keep(module, inputs):
        graphs.append([str(n.target) for n in module.graph.nodes if "fastzoo" in str(n.target)])
        return module.forward

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        function = torch.compile(
            lambda b, s: fastzoo.ops.nms(b, s, 0.5, backend="cpu"), backend=keep, fullgraph=True
        )
        assert function(BOXES, SCORES).tolist() == KEPT
    assert graphs == [["fastzoo.nms.cpu"]]


@pytest.mark.filterwarnings("ignore:.*performance drop:UserWarning")
def test_vmap_calls_the_chosen_overload() -> None:
    x, codebook = torch.randn(2, 5, 3), torch.randn(4, 3)
    with Overloads() as overloads:
        found = torch.vmap(lambda rows: fastzoo.ops.vq_nearest(rows, codebook, backend="cpu"))(x)
    assert set(overloads.names) == {"cpu"}
    assert torch.equal(found, fastzoo.ops.vq_nearest(x, codebook, backend="reference"))


# ---- info ----------------------------------------------------------------------------------------


def test_info_lists_every_operator_and_backend() -> None:
    info = fastzoo.info()
    assert set(info.operators) == set(OPERATORS)
    assert all(tuple(row) == backends.NAMES for row in info.operators.values())
    assert info.version == fastzoo.__version__
    assert info.build["version"] == fastzoo.__version__
    assert info.owners["nms"]["cpu"] == "cpu"
    assert info.cpu_capability == _native.cpu_capability()
    assert ("cuda" in info.owners["nms"]) == (DEVICE == "cuda")


def test_info_table_shows_owners_and_reasons() -> None:
    done = python("import fastzoo; print(fastzoo.info())")
    lines = done.stdout.splitlines()
    assert lines[0] == f"fastzoo {fastzoo.__version__}, torch {torch.__version__}"
    heading = next(line for line in lines if line.startswith("operator"))
    assert heading.split() == ["operator", *backends.NAMES]
    row = next(line for line in lines if line.startswith("nms ")).split()
    assert row[1:3] == ["yes", "auto:cpu"]
    if DEVICE == "cpu":
        assert row[3:] == ["no", "no"]
        assert any(line.startswith("cuda: ") for line in lines)
        assert any(line.startswith("triton: ") for line in lines)


# ---- the instruction set of the C++ CPU kernels --------------------------------------------------


@pytest.fixture
def default_capability() -> Iterator[None]:
    yield
    _native.force_cpu_capability(None)


def runnable(name: str) -> bool:
    try:
        _native.force_cpu_capability(name)
    except RuntimeError:
        return False
    _native.force_cpu_capability(None)
    return True


CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16")


@pytest.mark.usefixtures("default_capability")
def test_every_instruction_set_of_this_cpu_can_be_forced() -> None:
    best = _native.cpu_capability()
    here = [name for name in CAPABILITIES if runnable(name)]
    assert here[0] == "baseline"
    assert best == here[-1]
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(500, 2, generator=generator) * 50
    boxes = torch.cat([corner, corner + 20], 1)
    scores = torch.rand(500, generator=generator)
    expected = fastzoo.reference.nms(boxes, scores, 0.5)
    for name in here:
        _native.force_cpu_capability(name)
        assert _native.cpu_capability() == name
        assert torch.equal(fastzoo.ops.nms(boxes, scores, 0.5, backend="cpu"), expected)
    _native.force_cpu_capability(None)
    assert _native.cpu_capability() == best


@pytest.mark.usefixtures("default_capability")
def test_an_instruction_set_that_cannot_be_raises() -> None:
    before = _native.cpu_capability()
    for name in CAPABILITIES:
        if not runnable(name):
            with pytest.raises(RuntimeError, match=f"{name}: this CPU lacks these instructions"):
                _native.force_cpu_capability(name)
    with pytest.raises(RuntimeError, match="mmx: expected baseline, avx2, avx512 or avx512_bf16"):
        _native.force_cpu_capability("mmx")
    assert _native.cpu_capability() == before


@pytest.mark.usefixtures("default_capability")
def test_environment_chooses_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTZOO_CPU_CAPABILITY", "baseline")
    _native.force_cpu_capability(None)
    assert _native.cpu_capability() == "baseline"
    monkeypatch.setenv("FASTZOO_CPU_CAPABILITY", "mmx")
    _native.force_cpu_capability(None)
    with pytest.raises(RuntimeError, match="FASTZOO_CPU_CAPABILITY=mmx: expected baseline"):
        _native.cpu_capability()
    monkeypatch.delenv("FASTZOO_CPU_CAPABILITY")
