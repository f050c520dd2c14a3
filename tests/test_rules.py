"""Rules and alerts: promtool accepts them, each alert fires and keeps quiet when it should, each has its runbook."""

import re
import subprocess
import sys
from pathlib import Path

import promtool
import pytest
import queries
import yaml

ROOT = Path(__file__).resolve().parent.parent
ALERTS = yaml.safe_load((ROOT / "grafana" / "rules" / "moe-monitor-alerts.yml").read_text())["groups"][0]["rules"]
GRAFANA = yaml.safe_load((ROOT / "grafana" / "provisioning" / "alerting" / "moe-monitor.yaml").read_text())
NAMES = [rule["alert"] for rule in ALERTS]


def test_promtool_accepts_the_rules():
    command = [promtool.tool("promtool"), "check", "rules", *map(str, promtool.RULES)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_fires_and_does_not():
    path = ROOT / "tests" / "rules" / "alerts.yml"
    done = subprocess.run([promtool.tool("promtool"), "test", "rules", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    tests = yaml.safe_load(path.read_text())["tests"]
    assert {t["name"] for t in tests} == {f"{n} {what}" for n in NAMES for what in ("fires", "does not fire")}
    for test in tests:
        expected = [check["exp_alerts"] for check in test["alert_rule_test"]]
        assert not any(expected) if test["name"].endswith("does not fire") else expected[-1]


def test_generated_files_are_fresh():
    done = subprocess.run(
        [sys.executable, str(ROOT / "grafana" / "src" / "build.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python grafana/src/build.py"


@pytest.mark.parametrize("rule", ALERTS, ids=NAMES)
def test_each_alert_says_what_is_needed(rule):
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    notes = rule["annotations"]
    assert "{{ $labels.model_name }}" in notes["summary"]
    assert "$value" in notes["description"]
    runbook = ROOT / "docs" / "runbooks" / f"{rule['alert']}.md"
    assert notes["runbook_url"] == f"runbooks/{runbook.name}"
    text = runbook.read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == ["Meaning", "Impact", "Check", "Act", "False positives"]
    assert f"Severity: {rule['labels']['severity']}\n" in text
    assert max(map(len, text.splitlines())) <= 120
    assert (ROOT / "grafana" / "dashboards" / f"{notes['dashboard_uid']}.json").exists()


def test_no_runbook_without_an_alert():
    assert {p.stem for p in (ROOT / "docs" / "runbooks").glob("*.md")} == set(NAMES)


def test_grafana_managed_alerts_are_the_same():
    (group,) = GRAFANA["groups"]
    assert [rule["title"] for rule in group["rules"]] == NAMES
    assert len({rule["uid"] for rule in group["rules"]}) == len(NAMES)
    for ours, theirs in zip(ALERTS, group["rules"], strict=True):
        query, condition = (data["model"] for data in theirs["data"])
        evaluator = condition["conditions"][0]["evaluator"]
        sign = {"gt": ">", "lt": "<"}[evaluator["type"]]
        assert ours["expr"].split() == (
            [*query["expr"].split(), sign, f"{evaluator['params'][0]:g}"]
            if " " not in query["expr"]
            else ["(", *query["expr"].split(), ")", sign, f"{evaluator['params'][0]:g}"]
        )
        assert theirs["for"] == ours["for"]
        assert theirs["labels"] == ours["labels"]
        assert theirs["annotations"]["summary"] == ours["annotations"]["summary"]
        assert theirs["annotations"]["runbook_url"] == ours["annotations"]["runbook_url"]
        # Grafana's provisioning expands ${...} in annotations.
        assert "${" not in str(theirs["annotations"])


@pytest.mark.parametrize("rule", queries.rules(), ids=lambda rule: rule.get("alert") or rule["record"])
def test_rules_name_only_known_metrics(rule):
    assert queries.unknown(rule["expr"]) == set()


def test_only_the_matrix_group_reads_the_matrix():
    readers = [rule.get("alert") or rule["record"] for rule in queries.rules() if queries.MATRIX in rule["expr"]]
    assert readers == ["model_layer_expert:moe_expert_load:ratio5m"]
