"""Pieces for a machine with a GPU: under their limit, whole again there, refused by name where one is damaged."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
import zipfile

import pytest

from benchmarks.gpu import wheels
from benchmarks.gpu.pack import PIECES, UNPACK, Part, bundle, cut, write_pieces
from benchmarks.gpu.wheels import Content

LIMIT = 3000


def unpack(pieces, to, *names):
    command = [sys.executable, str(UNPACK), str(pieces), *names, "--to", str(to)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def pieces(tmp_path):
    """A small bundle that fits and one that takes two pieces more."""
    noise = bytes(range(256)) + b"".join(bytes([i * i * 7 % 251, i * 13 % 241, i % 239]) for i in range(2500))
    contents = [Content("site/lib/large.so", noise, True), Content("site/a.py", b"A = 1\n")]
    out, cache = tmp_path / "pieces", tmp_path
    small = bundle("code", "code", [Content("run.py", b"print(1)\n")], cache)
    write_pieces("base", [small], LIMIT, out)
    large = bundle("library", "a library", contents, cache)
    records = write_pieces("library", [large], large.size // 2 + 50, out)
    assert [r["piece"] for r in records] == ["library-1", "library-2"]
    return out, noise


def test_pieces_are_cut_at_their_limit_and_hold_everything_once():
    assert cut({"a": 10, "b": 25, "c": 5}, 20) == [
        [Part("a", 1, 0, 10), Part("b", 1, 0, 10)],
        [Part("b", 2, 10, 25), Part("c", 1, 0, 5)],
    ]
    assert cut({"a": 20}, 20) == [[Part("a", 1, 0, 20)]]
    for limit in (1, 7, 60):
        pieces = cut({"a": 40, "b": 1, "c": 22}, limit)
        assert all(0 < sum(p.end - p.start for p in piece) <= limit for piece in pieces)
        assert sum(p.end - p.start for piece in pieces for p in piece) == 63


def test_pieces_that_come_in_several_rounds_are_whole_in_the_end(pieces, tmp_path):
    folder, noise = pieces
    home = tmp_path / "home"
    first = unpack(folder, home, "base", "library-2")
    assert first.returncode == 0, first.stderr
    assert "library: 1 of 2 parts" in first.stdout
    assert (home / "code" / "run.py").read_text() == "print(1)\n"
    assert not (home / "library").exists()
    assert unpack(folder, home, "library-1").returncode == 0
    large = home / "library" / "site" / "lib" / "large.so"
    assert large.read_bytes() == noise
    assert large.stat().st_mode & 0o111
    assert f"{home}/library/site" in (home / "env.sh").read_text()
    again = unpack(folder, home)
    assert again.stdout.count("there already") == 2


def test_a_damaged_or_missing_piece_is_refused_by_name_and_nothing_is_unpacked(pieces, tmp_path):
    folder, _ = pieces
    damaged = folder / "library-2" / "library.tar.xz.2"
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    (folder / "library-1" / "library.tar.xz.1").unlink()
    refused = unpack(folder, tmp_path / "home")
    assert refused.returncode == 1
    assert "piece library-2: library.tar.xz.2 is damaged" in refused.stderr
    assert "piece library-1: library.tar.xz.1 is missing" in refused.stderr
    assert not (tmp_path / "home" / "code").exists()
    assert "piece none" in unpack(folder, tmp_path / "home", "none").stderr


def test_env_sh_puts_code_and_packages_on_the_path(pieces, tmp_path):
    folder, _ = pieces
    home = tmp_path / "a home"
    assert unpack(folder, home).returncode == 0
    script = f". '{home}/env.sh'; echo $PYTHONPATH; VIVACE_CODE=/checkout; . '{home}/env.sh'; echo $PYTHONPATH"
    shown = subprocess.run(["sh", "-c", script], env={}, capture_output=True, text=True).stdout.splitlines()
    assert shown[0] == f"{home}/code:{home}/library/site"
    assert shown[1].startswith(f"/checkout:{home}/library/site")


def test_wheels_are_laid_out_without_what_is_left_out(tmp_path):
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a/__init__.py", "a/tests/b.py", "a-1.data/purelib/c.py", "a-1.data/scripts/d", "bin/e"):
            archive.writestr(name, name)
    assert [c.name for c in wheels.files(path, ["a/*s", "bin"])] == ["a/__init__.py", "c.py"]
    stub = "pytriton/tritonserver/python_backend_stubs/"
    kept = wheels.for_python([stub + "3.11", "bin"], "3.11")
    assert "bin" in kept and stub + "3.12" in kept and stub + "3.11" not in kept


def test_every_wheel_of_pieces_toml_is_pinned_with_its_hash():
    sections = tomllib.loads(PIECES.read_text()).values()
    names = [name for s in sections for name in [*s["wheels"], *s.get("workers", {}).get("wheels", [])]]
    assert all("--hash=sha256:" in line for line in wheels.pinned(names).values())
    with pytest.raises(ValueError, match="no hash of unknown==1"):
        wheels.pinned(["unknown==1"])


def test_a_piece_says_what_it_holds(pieces):
    record = json.loads((pieces[0] / "library-1" / "piece.json").read_text())
    assert record["files"][0]["holds"] == "a library"
    assert record["size"] == (pieces[0] / "library-1" / "library.tar.xz.1").stat().st_size
