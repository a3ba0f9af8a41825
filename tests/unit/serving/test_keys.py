"""The file of keys: what is kept of a key, and what is refused."""

from __future__ import annotations

import hashlib
import re
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from serving.door.keys import Key, KeysError, add_key, digest, read_keys, remove_key
from vivace.cli.main import app

ONE = "a" * 64


def test_the_file_holds_a_digest_and_never_the_key(tmp_path):
    file = tmp_path / "keys.toml"
    kept, key = add_key(file, "web", days=30, rate=7, write=False)
    assert key not in file.read_text() and hashlib.sha256(key.encode()).hexdigest() in file.read_text()
    assert read_keys(file) == [kept] == [Key(name="web", sha256=digest(key), expires=kept.expires, rate=7, write=False)]
    assert timedelta(days=29, hours=23) < kept.expires - datetime.now(UTC) <= timedelta(days=30)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_line_by_hand_has_defaults(tmp_path):
    file = tmp_path / "keys.toml"
    file.write_text(f'# ours\nweb = {{ sha256 = "{ONE.upper()}", expires = 2030-01-02 }}\n')
    assert read_keys(file) == [Key(name="web", sha256=ONE, expires=datetime(2030, 1, 2, tzinfo=UTC))]
    add_key(file, "other")
    remove_key(file, "web")
    assert [k.name for k in read_keys(file)] == ["other"] and file.read_text().startswith("# ours\n")


def test_keys_that_are_added_at_once_are_all_there(tmp_path):
    file = tmp_path / "keys.toml"
    threads = [threading.Thread(target=add_key, args=(file, f"k{n}")) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {k.name for k in read_keys(file)} == {f"k{n}" for n in range(12)}


WRONG = {
    "no TOML": "web = ", "a key in clear": 'web = "vivace_secret"', "a short digest": 'web = { sha256 = "abc" }',
    "a field that is none": f'web = {{ sha256 = "{ONE}", admin = true }}',
    "a rate of nothing": f'web = {{ sha256 = "{ONE}", rate = 0 }}',
    "a date that is none": f'web = {{ sha256 = "{ONE}", expires = "soon" }}',
    "write that is none": f'web = {{ sha256 = "{ONE}", write = 1 }}',
    "a name that would be code": f'"a\\"}},--" = {{ sha256 = "{ONE}" }}',
    "our own name": f'-vivace = {{ sha256 = "{ONE}" }}',
    "one key twice": f'a = {{ sha256 = "{ONE}" }}\nb = {{ sha256 = "{ONE}" }}',
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_file(tmp_path, name):
    file = tmp_path / "keys.toml"
    file.write_text(WRONG[name])
    with pytest.raises(KeysError, match=re.escape(str(file))):
        read_keys(file)


def test_the_command_line_shows_a_key_once(tmp_path):
    run, file = CliRunner(), str(tmp_path / "keys.toml")
    added = run.invoke(app, ["keys", "add", "web", "--file", file, "--rate", "5", "--read-only"])
    (key,) = re.findall(r"^vivace_\S+$", added.output, re.MULTILINE)
    shown = run.invoke(app, ["keys", "list", "--file", file]).output
    assert key not in shown and digest(key)[:12] in shown and "web" in shown
    assert read_keys(tmp_path / "keys.toml")[0].sha256 == digest(key)
    assert run.invoke(app, ["keys", "add", "web", "--file", file]).exit_code == 1
    assert run.invoke(app, ["keys", "remove", "web", "--file", file]).exit_code == 0
    assert run.invoke(app, ["keys", "remove", "web", "--file", file]).exit_code == 1
