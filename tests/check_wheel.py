"""A wheel holds nothing of the machine that built it: no absolute path, in no file; and nothing but the package.

    python tests/check_wheel.py dist/fastbn-*.whl
"""

import os
import re
import sys
import tempfile
import zipfile
from pathlib import Path

ABSOLUTE = re.compile(rb"(?:^|[\0:])(/[\w.+-]+/[\w.+/-]{2,})(?=[\0:])")  # a C string, or an entry of a search path


def findings(wheel):
    """What is wrong with a wheel, in words."""
    package = Path(wheel).name.split("-")[0]
    own = {os.getcwd(), str(Path.home()), tempfile.gettempdir(), sys.prefix, sys.base_prefix} - {"/"}
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if not re.match(rf"{package}(-[\w.]+\.dist-info)?/", name) or ".." in name:
                yield f"{name} is not of the package"
            content = archive.read(name)
            yield from (f"{name} names {path}" for path in sorted(own) if path.encode() in content)
            if name.endswith((".so", ".pyd")):
                paths = {match[1].decode() for match in ABSOLUTE.finditer(content)}
                yield from (f"{name} names {path}" for path in sorted(paths))


def main():
    found = [f"{wheel}: {finding}" for wheel in sys.argv[1:] for finding in findings(wheel)]
    print("\n".join(found) or f"{len(sys.argv) - 1} wheel without absolute paths")
    return 1 if found or len(sys.argv) < 2 else 0


if __name__ == "__main__":
    sys.exit(main())
