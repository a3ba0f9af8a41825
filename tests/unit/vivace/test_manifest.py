"""A step takes up what it left itself, and nothing of another configuration."""

from __future__ import annotations

from vivace.manifest import Step


def test_what_another_configuration_left_is_not_taken_up(tmp_path):
    step = Step(tmp_path / "s", "learn", {"epochs": 2}, 1)
    step.keep_only_own()
    (step.folder / "half").mkdir()
    step.keep_only_own()
    assert (step.folder / "half").exists() and not step.done()
    step.finish(1.0)
    assert step.done()
    for other in (Step(step.folder, "learn", {"epochs": 3}, 1), Step(step.folder, "learn", {"epochs": 3}, 2)):
        (step.folder / "half").mkdir(exist_ok=True)
        other.keep_only_own()
        assert not (step.folder / "half").exists() and not other.done()
    bare = tmp_path / "old"
    bare.mkdir()
    (bare / "checkpoint.pt").touch()  # of a version that left no mark
    Step(bare, "learn", {}, 1).keep_only_own()
    assert not (bare / "checkpoint.pt").exists()
