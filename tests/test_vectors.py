"""The hot loops of each compiled instruction set work on vectors as wide as the set has."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import fastbn

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or not shutil.which("objdump"), reason="needs x86-64 and objdump"
)
REGISTERS = {"baseline": "xmm", "avx2": "ymm", "avx512": "zmm"}
KERNELS = ("sums_rows", "sums_lanes", "affine_runs", "grad_sums_rows", "grad_moments_task", "grad_affine_runs")
# grad_moments_task is the only caller of grad_sums_lanes, and so where the compiler puts it
GATED = ("affine_runs", "grad_sums_rows", "grad_affine_runs")  # with a ReLU, which compares


@pytest.fixture(scope="module")
def listings():
    """Instructions by instruction set, kernel and dtype."""
    found = {}
    for isa in REGISTERS:
        (module,) = Path(fastbn.__file__).parent.glob(f"kernels/_cython_{isa}.*.so")
        text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True,
                              check=True).stdout
        for name, body in re.findall(r"^[0-9a-f]+ <(\S+)>:\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL):
            kernel = re.match(r"__pyx_fuse_([01])_.*_cython_[a-z0-9]+_(\w+)", name)
            if kernel:
                found[isa, kernel[2], kernel[1]] = found.get((isa, kernel[2], kernel[1]), "") + body
    return found


@pytest.mark.parametrize("dtype", ["0", "1"], ids=["float32", "float64"])
@pytest.mark.parametrize("isa", REGISTERS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_the_loops_are_as_wide_as_the_registers(listings, kernel, isa, dtype):
    body, register = listings[isa, kernel, dtype], REGISTERS[isa]
    wide = re.findall(rf"\bv?(?:sub|add|mul|fn?madd)\d*p[sd]\s.*{register}", body)
    scalar = re.findall(r"\bv?(?:sub|add|mul|fn?madd)\d*s[sd]\s", body)
    # The columns that are over are scalar: up to 3.3 for a wide one. Scalar strips made it 10.
    assert len(scalar) <= 5 * len(wide)
    if kernel in GATED:
        wide = re.findall(rf"\bv?cmp\w*p[sd]\s.*{register}", body)
        scalar = re.findall(r"\bv?(?:cmp\w*s|u?comis)[sd]\s", body)
        assert len(scalar) <= 8 * len(wide)  # the same: 3.3, and 15 to 19
