"""The same tables as files: Prometheus rules, Grafana-managed alerts, and a PrometheusRule for Kubernetes."""

from __future__ import annotations

import hashlib
from typing import Any

import yaml

from moe_assets.alerts import ALERTS, VALUE, Alert
from moe_assets.recording import GROUPS

#: uid that the Grafana-managed alerts look for; the provisioned data source of examples/compose has it.
DATASOURCE_UID = "prometheus"

HEADER = "# Written by grafana/src/build.py. Change that, not this.\n"

#: Labels that tell engines apart; what ``SELF`` stands for in a query for details. ``server`` is there in what an
#: exporter shows of several servers on its node, and empty elsewhere.
SELF = ("job", "instance", "server", "model_name", "engine")


class _Dumper(yaml.SafeDumper):
    """Expressions as blocks, one line for one line."""


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    style = "|" if "\n" in value else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda *_: True  # type: ignore[method-assign]


def dump(data: Any, header: str = HEADER) -> str:
    return header + yaml.dump(data, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


def _details(alert: Alert) -> str:
    """A template that asks Prometheus for the layers concerned, when the alert fires."""
    if not alert.details:
        return ""
    matchers = ",".join(f"{name}=%q" for name in SELF)
    query = alert.details.replace('"', '\\"').replace("SELF", matchers)
    values = " ".join(f"$labels.{name}" for name in SELF * alert.details.count("SELF"))
    # Of these labels a query's answer has one, or a layer and its kind.
    own = (
        "{{ with .Labels.layer }}layer {{ . }}{{ end }}{{ with .Labels.kind }} in {{ . }}{{ end }}"
        "{{ with .Labels.ep_rank }}rank {{ . }}{{ end }}{{ .Labels.where }}{{ .Labels.what }}: "
    )
    item = own + f"{{{{ .Value | {alert.print} }}}}; "
    return f' {alert.heading}: {{{{ range query (printf "{query}" {values}) }}}}{item}{{{{ end }}}}'


def prometheus_alert(alert: Alert) -> dict[str, Any]:
    query = alert.query if " " not in alert.query else f"(\n{_indent(alert.query)}\n)"
    value = f'{{{{ $value | printf "{alert.shape}" }}}}'
    return {
        "alert": alert.name,
        "expr": f"{query} {alert.operator} {alert.threshold:g}",
        "for": alert.hold,
        "labels": {"severity": alert.severity, "component": "moe-monitor"},
        "annotations": {
            "summary": alert.summary,
            "description": alert.description.replace(VALUE, value) + _details(alert),
            "runbook_url": alert.runbook,
            "dashboard_uid": alert.dashboard,
        },
    }


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())


def recording_rules() -> dict[str, Any]:
    return {
        "groups": [
            {
                "name": group.name,
                "interval": group.interval,
                "rules": [{"record": rule.name, "expr": rule.expr} for rule in group.rules],
            }
            for group in GROUPS
        ]
    }


def alert_rules() -> dict[str, Any]:
    return {
        "groups": [
            {"name": "moe-monitor-alerts", "interval": "30s", "rules": [prometheus_alert(alert) for alert in ALERTS]}
        ]
    }


def prometheus_rule() -> dict[str, Any]:
    """For the Prometheus operator."""
    return {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "moe-monitor", "labels": {"app.kubernetes.io/name": "moe-monitor"}},
        "spec": {"groups": recording_rules()["groups"] + alert_rules()["groups"]},
    }


def _grafana_alert(alert: Alert) -> dict[str, Any]:
    value = f'{{{{ printf "{alert.shape}" $values.A.Value }}}}'
    span = {"from": 600, "to": 0}
    kind = {">": "gt", "<": "lt"}[alert.operator]
    return {
        "uid": "moe-" + hashlib.sha256(alert.name.encode()).hexdigest()[:12],
        "title": alert.name,
        "condition": "B",
        "data": [
            {
                "refId": "A",
                "relativeTimeRange": span,
                "datasourceUid": DATASOURCE_UID,
                "model": {"refId": "A", "expr": alert.query, "instant": True, "range": False},
            },
            {
                "refId": "B",
                "relativeTimeRange": span,
                "datasourceUid": "__expr__",
                "model": {
                    "refId": "B",
                    "type": "threshold",
                    "expression": "A",
                    "conditions": [{"evaluator": {"type": kind, "params": [alert.threshold]}}],
                },
            },
        ],
        # No series: no such engine, or none with a baseline. The monitor's own alerts cover its absence.
        "noDataState": "OK",
        "execErrState": "Error",
        "for": alert.hold,
        "annotations": {
            "summary": alert.summary,
            "description": alert.description.replace(VALUE, value),
            "runbook_url": alert.runbook,
            "__dashboardUid__": alert.dashboard,
        },
        "labels": {"severity": alert.severity, "component": "moe-monitor"},
        "isPaused": False,
    }


def grafana_alerts() -> dict[str, Any]:
    rules = [_grafana_alert(alert) for alert in ALERTS]
    group = {"orgId": 1, "name": "moe-monitor", "folder": "moe-monitor", "interval": "30s", "rules": rules}
    return {"apiVersion": 1, "groups": [group]}


def dashboard_provider() -> dict[str, Any]:
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "moe-monitor",
                "folder": "moe-monitor",
                "type": "file",
                "allowUiUpdates": True,
                "options": {"path": "/var/lib/grafana/dashboards/moe-monitor"},
            }
        ],
    }
