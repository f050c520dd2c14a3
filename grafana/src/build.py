"""Write everything under grafana/ and examples/kubernetes/ that is made from code, or check that it is fresh.

    python grafana/src/build.py [--check]

Needs grafana-foundation-sdk and PyYAML (the `test` extra).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.dont_write_bytecode = True  # this folder is shipped as it lies
sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]

from moe_assets import dashboards, rules  # noqa: E402  (found through the path set above)


def _config_map(name: str, content: str) -> dict[str, Any]:
    """As Grafana's dashboard sidecar looks for them."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": {"grafana_dashboard": "1", "app.kubernetes.io/name": "moe-monitor"}},
        "data": {f"{name}.json": content},
    }


def files() -> dict[str, str]:
    """Path relative to the repository -> content."""
    made = {f"grafana/dashboards/{uid}.json": json.dumps(d, indent=2) + "\n" for uid, d in dashboards.build().items()}
    maps = [_config_map(Path(path).stem, json.dumps(json.loads(text))) for path, text in made.items()]
    return made | {
        "grafana/rules/moe-monitor-recording.yml": rules.dump(rules.recording_rules()),
        "grafana/rules/moe-monitor-alerts.yml": rules.dump(rules.alert_rules()),
        "grafana/provisioning/alerting/moe-monitor.yaml": rules.dump(rules.grafana_alerts()),
        "grafana/provisioning/dashboards/moe-monitor.yaml": rules.dump(rules.dashboard_provider()),
        "examples/kubernetes/prometheusrule.yaml": rules.dump(rules.prometheus_rule()),
        "examples/kubernetes/dashboards.yaml": rules.HEADER + "---\n".join(rules.dump(m, "") for m in maps),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a file is not as it would be made")
    check = parser.parse_args().check
    stale = []
    for name, content in files().items():
        path = ROOT / name
        if path.exists() and path.read_text() == content:
            continue
        stale.append(name)
        if not check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    for name in stale:
        sys.stdout.write(("not fresh: " if check else "written: ") + name + "\n")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
