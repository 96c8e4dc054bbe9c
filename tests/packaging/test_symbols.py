"""What the libraries need from outside, and what the instruction sets share."""

import re
from collections import defaultdict
from pathlib import Path

import pytest

from tests.packaging.libraries import BUILD, LIBRARIES, PACKAGE, symbols

STABLE_ABI = frozenset((Path(__file__).parent / "torch_symbols.txt").read_text().split())
# From the system's C and C++ libraries and CUDA's: versioned, or of namespace std; and the names
# that compilers and linkers leave in every library.
SYSTEM = re.compile(
    r".+@+(GLIBC|GLIBCXX|CXXABI|GCC|libcudart)"
    r"|_ZN?K?St|_ITM_(de)?registerTMCloneTable$|__gmon_start__$|__cxa_finalize$|__popcountdi2$"
)


def foreign(names: list[str]) -> list[str]:
    """Those that are neither the system's nor on the committed list of torch's stable ABI."""
    return [name for name in names if not SYSTEM.match(name) and name not in STABLE_ABI]


def test_committed_list_is_the_stable_abi() -> None:
    assert [s for s in STABLE_ABI if not re.fullmatch(r"(aoti_torch|torch)_\w+", s)] == []


def test_the_cpu_library_is_built() -> None:
    assert PACKAGE / "_C_cpu.so" in LIBRARIES


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_need_only_torchs_stable_abi(library: Path) -> None:
    # A symbol new to the list must exist in torch 2.10: see the guards in
    # torch/csrc/stable/c/shim.h and torch/csrc/inductor/aoti_torch/c/shim.h.
    undefined = [name for _, name in symbols(library, "-D", "--undefined-only")]
    assert [name for name in undefined if name in STABLE_ABI], "nm named no torch symbol"
    assert foreign(undefined) == []


def test_a_foreign_symbol_is_seen() -> None:
    wrong = ["_ZN2at4_ops5empty4callEv", "_ZN3c105ErrorC1Ev", "_ZN7fastzoo4cuda10count_syncEv"]
    wrong += ["cuInit", "PyObject_Call", "aoti_torch_of_tomorrow"]
    fine = ["memcpy@GLIBC_2.14", "_ZNSt13runtime_errorD1Ev@GLIBCXX_3.4", "torch_call_dispatcher"]
    assert foreign(fine + wrong) == wrong


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda path: path.name)
def test_libraries_export_only_their_c_entries(library: Path) -> None:
    # What else is exported is std's: its templates are unique process-wide by its own choice.
    exported = [name for _, name in symbols(library, "-D", "--defined-only")]
    assert "fastzoo_signatures" in exported
    assert [n for n in exported if "fastzoo" in n and not n.startswith("fastzoo_")] == []


def shared_or_homeless(by_isa: dict[str, list[tuple[str, str]]]) -> list[str]:
    """Global symbols of more than one instruction set, or outside their own namespace.

    The linker keeps one copy of a symbol that two objects define: code that one instruction set
    compiled would run on a CPU that lacks it.
    """
    found: dict[str, set[str]] = defaultdict(set)
    wrong = []
    for isa, listed in by_isa.items():
        for _, name in listed:
            if name.startswith("DW.ref."):  # a pointer to the C++ runtime's exception handler
                continue
            found[name].add(isa)
            if f"N7fastzoo3cpu{len(isa)}{isa}" not in name:
                wrong.append(f"{name} of {isa} is outside fastzoo::cpu::{isa}")
    shared = [f"{name} is in {sorted(isas)}" for name, isas in found.items() if len(isas) > 1]
    return wrong + shared


def test_instruction_sets_share_no_symbol() -> None:
    if not BUILD.exists():
        pytest.skip("the objects of this build are not in build/native (built without -e)")
    folders = {
        p.name.removeprefix("cpu_kernels_").removesuffix(".dir"): p
        for p in BUILD.glob("CMakeFiles/cpu_kernels_*.dir")
    }
    assert "baseline" in folders
    listed = {
        isa: [s for o in folder.rglob("*.o") for s in symbols(o, "--defined-only", "--extern-only")]
        for isa, folder in folders.items()
    }
    assert all(listed.values())
    assert shared_or_homeless(listed) == []


def test_a_shared_symbol_is_seen() -> None:
    inline = ("W", "_ZN7fastzoo4math7box_iouEv")
    assert len(shared_or_homeless({"avx2": [inline], "avx512": [inline]})) == 3
    mine = ("T", "_ZN7fastzoo3cpu4avx29nms_floatEv")
    assert shared_or_homeless({"avx2": [mine], "avx512": []}) == []
    assert len(shared_or_homeless({"avx512": [mine]})) == 1
