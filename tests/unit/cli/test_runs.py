"""Which run a step takes, and what is said where there is none."""

from __future__ import annotations

import os
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from tests.support import wait_until
from vivace.cli import main
from vivace.cli.runs import find_run, joined_log, mark_prepared, say_next, steps_follow
from vivace.impressions.files import REQUEST_ID
from vivace.impressions.samples import TURN, SampleOptions, SampleWriter
from vivace.manifest import MANIFEST
from vivace.run import Run

RUNNER = CliRunner()


@pytest.fixture
def artifacts(tmp_path):
    """Runs a and b, a prepared first; beside them a folder that is none."""
    for seconds, name in enumerate("ab"):
        folder = tmp_path / name / "features"
        folder.mkdir(parents=True)
        (folder / MANIFEST).write_text("{}")
        os.utime(folder / MANIFEST, (seconds, seconds))
    (tmp_path / "notes").mkdir()
    return tmp_path


def test_without_a_name_the_run_prepared_last_is_taken_and_named(artifacts, capsys):
    assert find_run(artifacts).root.name == "b"
    assert "run b: prepared last" in capsys.readouterr().out
    mark_prepared(Run(artifacts / "a"))
    assert find_run(artifacts).root.name == "a"


def test_the_only_run_is_taken(artifacts, capsys):
    (artifacts / "b" / "features" / MANIFEST).unlink()
    assert find_run(artifacts).root.name == "a"
    assert "the only one" in capsys.readouterr().out


def test_a_compressed_variant_is_a_run_by_its_path(artifacts):
    (artifacts / "a" / "compressed" / "small").mkdir(parents=True)
    assert find_run(artifacts, "a/compressed/small").root == artifacts / "a" / "compressed" / "small"
    with pytest.raises(FileNotFoundError, match="a/compressed/small"):
        find_run(artifacts, "a/compressed/smal")


@pytest.mark.parametrize("verb", ["train", "evaluate", "compile", "serve", "tune", "load", "optimize", "pretrain"])
def test_an_unknown_run_is_refused_with_those_there_are(verb, artifacts):
    out = RUNNER.invoke(main.app, [verb, "--name", "shop", "--artifacts", str(artifacts)])
    assert out.exit_code == 1 and "b, a" in out.stderr, out.output
    assert not (artifacts / "shop").exists()


def test_without_any_run_the_command_that_makes_one_is_named(tmp_path):
    out = RUNNER.invoke(main.app, ["train", "--artifacts", str(tmp_path)])
    assert out.exit_code == 1 and "vivace prepare" in out.stderr
    assert not list(tmp_path.iterdir())


def test_the_next_command_can_be_typed(artifacts, capsys):
    say_next("train --epochs 2", Run(artifacts / "a"), artifacts)
    assert capsys.readouterr().out.strip() == f"· next: vivace train --name a --artifacts {artifacts} --epochs 2"


def test_who_runs_several_steps_names_none_of_them(artifacts, capsys):
    run = Run(artifacts / "a")
    with pytest.raises(KeyError), steps_follow():
        say_next("train", run, artifacts)
        raise KeyError
    assert capsys.readouterr().out == ""
    say_next("serve", run, artifacts)
    assert "next: vivace serve" in capsys.readouterr().out


def test_tables_are_named_by_their_mapping(tmp_path):
    """``name`` of the mapping is the folder, the default of the next step and the schema's name."""
    rows = "".join(f"{user},{item},{time}\n" for user in "uvw" for time, item in enumerate("abcd", 1_700_000_000))
    (tmp_path / "log.csv").write_text("user,item,time\n" + rows)
    mapping = 'name = "my-books"\n[interactions]\nfiles = "log.csv"\nuser = "user"\nitem = "item"\ntime = "time"\n'
    (tmp_path / "mapping.toml").write_text(mapping)
    artifacts = tmp_path / "runs"
    out = RUNNER.invoke(
        main.app,
        ["prepare", "--data", "tables", "--path", str(tmp_path / "mapping.toml"), "--artifacts", str(artifacts),
         "--partitions", "1"],
    )  # fmt: skip
    assert out.exit_code == 0, out.output
    assert f"next: vivace train --name my-books --artifacts {artifacts}" in out.output
    assert find_run(artifacts).schema().name == "my-books"


def test_a_joined_log_is_named_where_it_is_not_there_or_another_file(artifacts):
    run, other = Run(artifacts / "a"), artifacts / "README.md"
    with pytest.raises(FileNotFoundError, match="run 'vivace experiment impressions --name a'"):
        joined_log(run, None)
    other.write_text("words")
    pq.write_table(pa.table({"x": [1]}), artifacts / "x.parquet")
    for file in (other, artifacts / "x.parquet"):
        with pytest.raises(ValueError, match="expected a joined log of impressions, as 'vivace experiment impressions"):
            joined_log(run, file)
    pq.write_table(pa.table({REQUEST_ID: ["r"]}), artifacts / "x.parquet")
    assert joined_log(run, artifacts / "x.parquet") == artifacts / "x.parquet"


def test_parity_says_when_a_sample_comes(artifacts):
    look = ["parity", "--name", "a", "--artifacts", str(artifacts)]
    out = RUNNER.invoke(main.app, look)
    assert out.exit_code == 1 and "no sample yet" in out.stderr and "vivace serve --name a" in out.stderr, out.output
    writer = SampleWriter(SampleOptions(str(artifacts / "a" / "parity"), 0.01))
    wait_until((artifacts / "a" / "parity" / TURN).exists, "word of the first turn")
    out = RUNNER.invoke(main.app, look)
    assert out.exit_code == 0 and re.search(
        r"no sample waits; .* written within \d+ s", " ".join(out.stdout.split())
    ), out.output
    writer.close()
