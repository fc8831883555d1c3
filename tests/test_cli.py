"""The command line where something fails outside it: a wrong setting, a closed pipe, a full disk, an interrupt."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import fastbn
from fastbn import _files, cli

COMMAND = [sys.executable, "-P", "-m", "fastbn"]


def run(*words, unbuffered=False, **options):
    environment = {**os.environ, "PYTHONPATH": str(Path(fastbn.__file__).parents[1])}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    return subprocess.run([*COMMAND, *words], env=environment | options.pop("settings", {}), text=True, timeout=120,
                          stderr=subprocess.PIPE, check=False, **options)


@pytest.mark.parametrize("words", [["info"], ["bench", "--quick"], ["demo"]])
def test_a_wrong_setting_is_told_in_one_line(words, tmp_path):
    result = run(*words, settings={"FASTBN_ISA": "mmx"}, stdout=subprocess.PIPE, cwd=tmp_path)
    assert result.returncode == 2
    assert re.match(r"fastbn( demo)?: error: FASTBN_ISA must be one of \('baseline'", result.stderr)
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_closed_pipe_is_no_error_to_tell(unbuffered):
    read, write = os.pipe()
    os.close(read)
    result = run("info", unbuffered=unbuffered, stdout=write)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize("unbuffered", [False, True])
def test_a_full_disk_is_told(unbuffered):
    with open("/dev/full", "w") as full:
        result = run("info", "--json", unbuffered=unbuffered, stdout=full)
    assert (result.returncode, result.stderr) == (1, "fastbn: error: [Errno 28] No space left on device\n")


def test_an_interrupt_before_the_command_began(monkeypatch, capsys):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    assert cli.main(["info"]) == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_a_file_is_written_through_a_link_and_keeps_its_mode(tmp_path):
    there, link = tmp_path / "there.md", tmp_path / "link.md"
    there.write_text("old")
    there.chmod(0o640)
    link.symlink_to(there)
    with _files.whole(link) as path:
        path.write_text("new")
        assert there.read_text() == "old"
    assert link.is_symlink()
    assert there.read_text() == "new"
    assert stat.S_IMODE(there.stat().st_mode) == 0o640
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link.md", "there.md"]


@pytest.mark.parametrize("name", [".", os.devnull, "no/such/folder/a.md"])
def test_what_cannot_be_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"cannot write '{name}'"):
        _files.check_writable(name)
    _files.check_writable("new.md")
    assert not list(tmp_path.iterdir())
