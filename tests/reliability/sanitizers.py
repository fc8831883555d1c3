"""The Cython kernels compiled with AddressSanitizer and UndefinedBehaviorSanitizer (FASTBN_SANITIZE=address,undefined),
for every instruction set: reads and writes beside arrays and stack buffers, use after free, integer and pointer
overflow, loads from unaligned addresses. One finding ends the process, so that all tests behind it are lost."""

import subprocess

import fastbn
from reliability import builds

# the first two for every set
TESTS = ["kernels", "repeatability", "contract", "fuzz", "inputs", "memory", "moments"]


def run(tally, scale):
    target = builds.install("sanitize", FASTBN_SANITIZE="address,undefined")
    found = fastbn.show_config(as_dict=True)["instruction_set"]
    for done, name in enumerate(found["usable"]):
        files = TESTS if name == found["chosen"] else TESTS[:2]
        words = ["-k", "not numba and not numpy", *(f"tests/test_{file}.py" for file in files)]
        builds.pytest(tally, f"tests, {name}", target, words, FASTBN_ISA=name, **environment(name))
        tally.progress((done + 1) / len(found["usable"]))


def environment(name):
    """The sanitizers must be loaded before anything else; Python's own allocator would hide errors from them.

    What finds use after return puts variables on a stack of its own, which GCC 12 aligns to 32 bytes for code that
    loads from multiples of 64: the AVX-512 kernels crash on it. The other sets are compiled from the same source.
    """
    after_return = int(name != "avx512")
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {
        "LD_PRELOAD": " ".join(libraries),
        "PYTHONMALLOC": "malloc",
        "ASAN_OPTIONS": f"detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return={after_return}",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
