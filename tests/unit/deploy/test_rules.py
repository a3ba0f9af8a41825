"""Alerts fire when they should, by promtool, on the series of rules_test.yml."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

CHECKOUT = Path(__file__).resolve().parents[3]
RULES, SERIES = CHECKOUT / "deploy" / "compose" / "rules.yml", Path(__file__).with_name("rules_test.yml")
pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="needs promtool (apt-get install prometheus)")


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True)


def test_alerts_fire_on_what_they_are_for_and_on_nothing_else():
    done = promtool("test", "rules", SERIES)
    assert not done.returncode, done.stdout + done.stderr


def test_every_alert_is_tried_and_has_somebody_to_read_it():
    alerts = [r for g in yaml.safe_load(RULES.read_text())["groups"] for r in g["rules"] if "alert" in r]
    tried = {
        case["alertname"]
        for test in yaml.safe_load(SERIES.read_text())["tests"]
        for case in test.get("alert_rule_test", [])
        if case["exp_alerts"]
    }
    assert {alert["alert"] for alert in alerts} - tried == {"VivaceErrorBudgetSlow"}, (
        "the ticket of the same expression"
    )
    assert all(alert["labels"]["severity"] in ("page", "ticket") and alert["annotations"] for alert in alerts)


def test_another_budget_would_fail(tmp_path):
    """The expected alerts hang on the rules' own figures."""
    (tmp_path / "rules.yml").write_text(RULES.read_text().replace("14.4 * .001", "2.0 * .001"))
    series = SERIES.read_text().replace("../../../deploy/compose/rules.yml", str(tmp_path / "rules.yml"))
    (tmp_path / "rules_test.yml").write_text(series)
    done = promtool("test", "rules", tmp_path / "rules_test.yml")
    assert done.returncode and "VivaceErrorBudgetFast" in done.stdout + done.stderr


def test_compose_loads_them():
    assert not promtool("check", "config", RULES.with_name("prometheus.yml")).returncode
