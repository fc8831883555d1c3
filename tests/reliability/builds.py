"""Builds of fastbn with other compiler flags, in build/<name>, and the tests run on them."""

import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path

ROOT = Path(__file__).parents[2]


def install(name, **switches):
    """Where a build of this source tree with these switches is, ready to import; built where a source is newer."""
    target = ROOT / "build" / name
    built = target / "built"
    sources = [ROOT / "setup.py", *(path for kind in ("py", "pyx", "h") for path in ROOT.glob(f"fastbn/**/*.{kind}"))]
    if not built.exists() or built.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--upgrade", "--no-warn-script-location",
                   "--target", str(target), str(ROOT)]
        subprocess.run(command, env=os.environ | switches, check=True)
        built.touch()
    return target


def pytest(tally, name, target, words, **environment):
    """Run the tests on a build; every one that passed counts, and every other one is lost."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junit-xml={report}", *words],
            cwd=ROOT, env=os.environ | {"PYTHONPATH": str(target)} | environment, capture_output=True, text=True,
        )
        suite = ET.parse(report).getroot().find("testsuite").attrib if report.exists() else {}
    count = {key: int(suite.get(key, 0)) for key in ("tests", "errors", "failures", "skipped")}
    tally.count(name, count["tests"] - sum(count[key] for key in ("errors", "failures", "skipped")))
    said = done.stdout[-3000:] + done.stderr[-3000:]
    tally.expect(done.returncode == 0, f"{name}: exit status {done.returncode}\n{said}")
