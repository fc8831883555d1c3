"""The compiled kernels: one source, one extension module per instruction set, chosen at import.

Environment: FASTBN_OPENMP=0 builds without OpenMP (serial kernels).
"""

import os
import platform
import sys
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("fastbn/kernels")
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_1_22_API_VERSION")]
if sys.platform != "win32":
    # The hot loops need literal sizes, so what is written inline must be inlined: 25 % to 150 % of the speed.
    MACROS.append(("CYTHON_INLINE", "__inline__ __attribute__((always_inline))"))
# GCC unrolls a loop of 16 steps whole before it vectorises; a strip with a ReLU then stays scalar, ten times slower.
KEEP_LOOPS = ["--param", "max-completely-peel-times=15"]
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
}


def instruction_sets() -> dict[str, list[str]]:
    """Compiler flags by instruction set; everything but x86-64 has the baseline alone."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64") and sys.platform != "win32"
    return {"baseline": [], **(X86_FLAGS if is_x86 else {})}


class BuildKernels(build_ext):
    """Adds OpenMP and GCC's flags where the compiler has them, and compiles the instruction sets side by side."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or os.cpu_count()

    def build_extensions(self) -> None:
        compile_flags, link_flags = self.openmp_flags()
        if self.builds("int main(void) { return 0; }\n", KEEP_LOOPS, []):
            compile_flags = compile_flags + KEEP_LOOPS
        for extension in self.extensions:
            extension.extra_compile_args += compile_flags
            extension.extra_link_args += link_flags
        super().build_extensions()

    def openmp_flags(self) -> tuple[list[str], list[str]]:
        if os.environ.get("FASTBN_OPENMP") == "0":
            return [], []
        if self.compiler.compiler_type == "msvc":
            return ["/openmp"], []
        candidates = [(["-fopenmp"], ["-fopenmp"])]
        if sys.platform == "darwin":
            candidates.append((["-Xpreprocessor", "-fopenmp"], ["-lomp"]))
        for compile_flags, link_flags in candidates:
            if self.builds("#include <omp.h>\nint main(void) { return omp_get_max_threads() < 1; }\n",
                           compile_flags, link_flags):
                return compile_flags, link_flags
        print("fastbn: this compiler has no OpenMP; the kernels will run on one thread")
        return [], []

    def builds(self, source: str, compile_flags: list[str], link_flags: list[str]) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.c")
            path.write_text(source)
            try:
                objects = self.compiler.compile([str(path)], output_dir=folder, extra_postargs=compile_flags)
                self.compiler.link_executable(objects, str(Path(folder, "probe")), extra_postargs=link_flags)
            except Exception:  # whatever the compiler says, the answer is no
                return False
        return True


def extensions() -> list[Extension]:
    # sqrt without errno vectorises; results are the same bits.
    optimise = [] if sys.platform == "win32" else ["-O3", "-g0", "-fno-math-errno", "-fno-trapping-math"]
    return [
        Extension(
            f"fastbn.kernels._cython_{name}",
            [str(KERNELS / f"_cython_{name}.pyx")],
            include_dirs=[numpy.get_include(), str(KERNELS)],
            define_macros=MACROS,
            depends=[str(KERNELS / name) for name in ("cython_kernels.pyx", "cython_calls.pyx", "machine.h")],
            extra_compile_args=optimise + flags,
        )
        for name, flags in instruction_sets().items()
    ]


setup(
    ext_modules=cythonize(extensions(), build_dir="build/cython"),
    cmdclass={"build_ext": BuildKernels},
)
