"""The compiled kernels: one source, one extension module per instruction set, chosen at import.

Environment: FASTBN_OPENMP=0 builds without OpenMP (serial kernels); FASTBN_SANITIZE=address,undefined compiles the
kernels with these sanitizers; FASTBN_DEBUG=1 builds for a debugger, with every check that Cython, Python, NumPy and the
C library have. What is built with other values than the last time is built anew.
"""

import os
import platform
import sys
import sysconfig
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

KERNELS = Path("fastbn/kernels")
BUILD = Path("build/kernels")  # generated C, and what it was generated for
SANITIZE = os.environ.get("FASTBN_SANITIZE", "")
DEBUG = os.environ.get("FASTBN_DEBUG", "0") != "0"
MACROS = [("NPY_NO_DEPRECATED_API", "NPY_1_22_API_VERSION")]
if sys.platform != "win32":
    # The hot loops need literal sizes, so what is written inline must be inlined: 25 % to 150 % of the speed.
    MACROS.append(("CYTHON_INLINE", "__inline__ __attribute__((always_inline))"))
GCC_FLAGS = [
    # It unrolls a loop of 16 steps whole before it vectorises; a strip with a ReLU then stays scalar, ten times slower.
    "--param", "max-completely-peel-times=15",
    # It takes loops through arrays that could stay in registers for copies of memory, by way of the stack in vectors of
    # another width, whose loads wait for the stores. On Zen 4 affine took 1.3 times the time of float64, 1.3 to 1.8 by
    # AVX2 and by the baseline, grad_affine 1.2 and 1.2 to 1.4; float32 by AVX-512, one vector a strip, as long.
    "-fno-tree-loop-distribute-patterns",
    # Python's own flags have this one or not, by how it was built. Without, loops keep more on the stack, whose loads
    # wait for stores (Zen 5, sums of the backward of 65536x256: 1.08 to 1.15 times the time) ...
    "-fwrapv",
    # ... and with what is called from one place only as part of its caller (every other row of 62500x64: affine 1.25).
    "-fno-inline-functions-called-once",
]
# Without -mprfchw, GCC fetches for reading what is to be written. Not for AVX2: a Haswell would not fetch at all.
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512vl", "-mavx512dq", "-mavx512bw", "-mfma", "-mprfchw",
               "-mprefer-vector-width=512"],
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
        if self.builds("int main(void) { return 0; }\n", GCC_FLAGS, []):
            compile_flags = compile_flags + GCC_FLAGS
        self.forget_library_folder()
        for extension in self.extensions:
            extension.extra_compile_args += compile_flags
            extension.extra_link_args += link_flags
        super().build_extensions()

    def forget_library_folder(self) -> None:
        """The folder that Python was linked with is no business of the kernels, and differs on the user's machine."""
        own = [word for word in (sysconfig.get_config_var("LDSHARED") or "").split() if word.startswith("-Wl,-rpath")]
        for name in ("linker_so", "linker_so_cxx"):
            command = getattr(self.compiler, name, None)
            if command:
                setattr(self.compiler, name, [word for word in command if word not in own])

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


def flags() -> tuple[list[str], list[str]]:
    """For the compiler and for the linker."""
    if sys.platform == "win32":
        return [], []
    # sqrt without errno vectorises; results are the same bits.
    compiler = ["-fno-math-errno", "-fno-trapping-math"]
    if SANITIZE:
        sanitizers = [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
        return [*compiler, "-O1", "-g", "-fno-omit-frame-pointer", *sanitizers], sanitizers
    if DEBUG:  # NDEBUG would leave out the assertions of Python's and NumPy's headers
        return [*compiler, "-O1", "-g", "-UNDEBUG", "-D_FORTIFY_SOURCE=2"], []
    return [*compiler, "-O3", "-g0", "-DNDEBUG"], []


def source(name: str) -> str:
    """The file of an instruction set; in a debug build a copy of it with Cython's checks on."""
    path = KERNELS / f"_cython_{name}.pyx"
    if not DEBUG:
        return str(path)
    text = path.read_text()
    for check in ("boundscheck", "initializedcheck"):
        text = text.replace(f"{check}=False", f"{check}=True")
    return written(BUILD / path.name, text)


def written(path: Path, text: str) -> str:
    """The path of a file with this text, whose date tells since when."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)
    return str(path)


def bench_passes(compiler: list[str], linker: list[str], switches: str) -> Extension:
    """The bare memory passes that `fastbn bench` measures beside the kernels."""
    return Extension(
        "fastbn.bench.passes", ["fastbn/bench/passes.pyx"], include_dirs=[str(KERNELS)],
        depends=[str(KERNELS / "machine.h"), switches], extra_compile_args=compiler, extra_link_args=linker,
    )


def extensions() -> list[Extension]:
    compiler, linker = flags()
    chosen = " ".join(f"{name}={os.environ.get(f'FASTBN_{name}', '')}" for name in ("OPENMP", "SANITIZE", "DEBUG"))
    switches = written(BUILD / "switches", chosen)  # other ones: everything is built again
    depends = [str(KERNELS / name) for name in ("cython_kernels.pyx", "cython_calls.pyx", "machine.h", "quads.h")]
    return [
        Extension(
            f"fastbn.kernels._cython_{name}",
            [source(name)],
            include_dirs=[numpy.get_include(), str(KERNELS)],
            define_macros=MACROS,
            depends=[*depends, switches],
            extra_compile_args=compiler + isa_flags,
            extra_link_args=linker,
        )
        for name, isa_flags in instruction_sets().items()
    ] + [bench_passes(compiler, linker, switches)]


setup(
    ext_modules=cythonize(
        extensions(), build_dir=str(BUILD / "debug" if DEBUG else BUILD), include_path=[str(KERNELS)]
    ),
    cmdclass={"build_ext": BuildKernels},
)
