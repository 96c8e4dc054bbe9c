"""Every CUDA kernel, compiled for every architecture of the wheel, on a machine without a GPU."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

ARCHITECTURES = {"80": "sm_80", "90a": "sm_90a", "100+PTX": "sm_100"}


def disassembler() -> str:
    """cuobjdump of the toolkit, or the one that triton's wheel carries."""
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.origin is not None
    carried = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return shutil.which("cuobjdump") or str(carried)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The library and what ptxas said of each kernel."""
    folder = tmp_path_factory.mktemp("cuda")
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFASTZOO_CUDA=ON"),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFASTZOO_TORCH={Path(torch.__file__).parent}",
        f"-DFASTZOO_CUDA_ARCHS={' '.join(ARCHITECTURES)}",
        f"-DFASTZOO_PYTHON_OUTPUT={folder / 'out'}",
    ]
    subprocess.run(configure, check=True, capture_output=True)
    compile_ = ["cmake", "--build", str(folder), "--target", "_C_cuda"]
    report = subprocess.run(compile_, check=True, capture_output=True, text=True)
    return folder / "out" / "_C_cuda.so", report.stdout + report.stderr


def dump(library: Path, *options: str) -> str:
    command = [disassembler(), *options, str(library)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def functions(text: str, start: str) -> list[tuple[str, str]]:
    """Names and texts of a dump's functions, of each architecture."""
    parts = re.split(start, text)[1:]
    return list(zip(parts[::2], parts[1::2], strict=True))


def test_nothing_spills(build: tuple[Path, str]) -> None:
    report = build[1]
    kernels = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'\n.*Function properties for \1\n"
        r" *(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers",
        report,
    )
    assert len(kernels) == report.count("Compiling entry function") > 0
    assert {architecture for _, architecture, *_ in kernels} == set(ARCHITECTURES.values())
    for name, architecture, *frame, used in kernels:
        print(f"{architecture:8} {used:>4} registers  {name}")
        # CUDA's sine of a double has a frame of its own, for huge arguments.
        size = "40" if re.search("margin_softmax_target_(values|slopes)", name) else "0"
        assert frame == [size, "0", "0"], f"{name} for {architecture} spills"


def test_decisions_are_not_contracted(build: tuple[Path, str]) -> None:
    ptx = functions(dump(build[0], "--dump-ptx"), r"\.entry (\w+)\(")
    keep = [body for name, body in ptx if re.search("nms_keep|soft_nms_take|matrix_nms_pass", name)]
    # For double inputs the fast pass asks for fused operations in double, by name.
    exact = [body for name, body in ptx if "vq_finish" in name and "DoublePass" not in name]
    points = [body for name, body in ptx if re.search("search_t|farthest_|voxel_claim", name)]
    noise = [body for name, body in ptx if "counter_numbers" in name]
    assert len(keep) >= 20
    assert len(points) == 20 + 11 + 2
    assert len(noise) == 2
    assert len(exact) == 3 * 2
    for body in keep:
        assert "fma.rn" not in body
        assert "div.rn" in body
    for body in exact:
        assert "fma.rn.f64" not in body
        assert "mul.rn.f64" in body
        assert "sqrt.rn.f64" in body
    for body in points + noise:
        assert "fma.rn" not in body
    assert any("sqrt.rn.f32" in body for body in noise)
    assert not any("sqrt.approx" in body for body in noise)


def test_streams_move_sixteen_bytes(build: tuple[Path, str]) -> None:
    sass = functions(dump(build[0], "--dump-sass"), r"Function : (\w+)")
    keep = [body for name, body in sass if "nms_keep" in name]
    scans = "(softmax|contrastive|vq)_scan|density_scan_wide|pointconv_plain_linear"
    tiles = [body for name, body in sass if re.search(scans, name)]
    gathers = [body for name, body in sass if re.search("pointconv_(fused|sums)", name)]
    shared = [body for name, body in sass if re.search("density_scanI|pointconv_fused", name)]
    rows = [body for name, body in sass if re.search("margin_softmax_factors|_positives", name)]
    maps = [body for name, body in sass if re.search(r"coupling_(map|gradient)\w*Li[248]E", name)]
    splines = [(name, body) for name, body in sass if re.search("splines_(map|gradient)", name)]
    steps = [body for name, body in sass if "ode_step_rows" in name]
    sums = [body for name, body in sass if re.search("(guidance|error)_parts", name)]
    noise = [body for name, body in sass if "counter_numbers" in name]
    stored = maps + [body for name, body in splines if "splines_gradient" in name] + steps + noise
    assert len(keep) >= 4
    assert len(tiles) == len(ARCHITECTURES) * (12 + 12 + 6 + 6 + 2)
    assert len(gathers) == len(ARCHITECTURES) * (4 + 2)
    assert len(shared) == len(ARCHITECTURES) * (6 + 4)
    assert len(rows) == len(ARCHITECTURES) * (4 + 4)
    assert len(maps) == len(ARCHITECTURES) * 4 * 10 * 2
    assert len(splines) == len(ARCHITECTURES) * (3 * 8 + 4) * 2
    assert len(steps) == len(ARCHITECTURES) * 3 * (3 * 2 + 1) * 2
    assert len(sums) == len(ARCHITECTURES) * 4 * 2
    assert len(noise) == len(ARCHITECTURES) * 2
    for body in keep:
        assert "LDS.128" in body
    for body in tiles + shared:
        assert "LDS.128" in body or "LDSM.16.M88.4" in body
    pieces = maps + [body for _, body in splines] + steps + sums
    for body in keep + tiles + rows + gathers + pieces:
        assert re.search(r"LDG\.E(\.\w+)*\.128", body)
    for body in stored:
        assert re.search(r"STG\.E(\.\w+)*\.128", body)


def test_products_take_the_units_of_their_precision(build: tuple[Path, str]) -> None:
    sass = functions(dump(build[0], "--dump-sass"), r"Function : (\w+)")
    products = "(softmax|contrastive|vq)_scan|pointconv_(fused|sums|plain_linear)"
    scans = [(name, body) for name, body in sass if re.search(products, name)]
    units = {
        r"MmaScheme\w*MmaTypeE0": "HMMA.16816.F32 ",
        r"MmaScheme\w*MmaTypeE1": "HMMA.16816.F32.BF16",
        "FusedSchemeIfE": "FFMA",
        "FusedSchemeIdE": "DFMA",
        "vq_scan.*(Split|Fast)Pass": "HMMA.16816.F32.BF16",
        "vq_scan.*DoublePass": "DFMA",
        r"pointconv_(fused|sums)\w*Half": "HMMA.16816.F32 ",
        r"pointconv_(fused|sums)\w*BFloat16": "HMMA.16816.F32.BF16",
        "pointconv_plain_linearIf": "FFMA",
        "pointconv_plain_linearId": "DFMA",
    }
    seen = dict.fromkeys(units, 0)
    for name, body in scans:
        (scheme,) = (scheme for scheme in units if re.search(scheme, name))
        seen[scheme] += 1
        assert units[scheme] in body, name
        # Nothing is rounded on the way that the scheme does not round.
        assert ("HMMA" in body) == units[scheme].startswith("HMMA"), name
    assert all(count % len(ARCHITECTURES) == 0 for count in seen.values())
    assert all(seen.values())
