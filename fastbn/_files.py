"""Files that the commands write: whole or not at all, and asked about before the work begins."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(name: str | Path) -> None:
    """Raise ValueError where `whole` could not write this file."""
    path = Path(name).resolve()
    try:
        if path.exists() and not path.is_file():  # a folder, a device
            raise OSError
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError:
        raise ValueError(f"cannot write {str(name)!r}") from None


@contextmanager
def whole(name: str | Path) -> Iterator[Path]:
    """Where to write a file that gets its name (behind a link, the link's) when it is complete: of half a one nothing
    stays, and an old one keeps its mode."""
    path = Path(name).resolve()
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        if path.exists():
            shutil.copymode(path, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
