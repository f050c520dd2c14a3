"""examples/compose and examples/kubernetes: what their schemas, promtool and amtool can tell without running them."""

import json
import re
import shutil
import subprocess
import urllib.request
from pathlib import Path

import promtool
import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parent.parent
COMPOSE, KUBERNETES = ROOT / "examples" / "compose", ROOT / "examples" / "kubernetes"


def schema(name):
    made = json.loads((ROOT / "tests" / "schemas" / f"{name}.json").read_text())
    Draft202012Validator.check_schema(made)
    return Draft202012Validator(made)


def load(path):
    return yaml.safe_load(path.read_text())


def problems(name, data):
    return [f"{e.json_path}: {e.message}" for e in schema(name).iter_errors(data)]


def test_compose_by_schema():
    assert problems("compose", load(COMPOSE / "compose.yaml")) == []


def test_compose_mounts_what_is_there():
    data = load(COMPOSE / "compose.yaml")
    named = set(data["volumes"])
    for service in data["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (COMPOSE / source).exists(), source
            else:
                assert source in named
        assert set(service.get("depends_on", [])) <= set(data["services"])
        if "build" in service:
            assert (COMPOSE / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
    # Nothing is open to the network.
    ports = [port for s in data["services"].values() for port in s.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_services_reach_each_other():
    services = set(load(COMPOSE / "compose.yaml")["services"])
    for path in COMPOSE.rglob("*.y*ml"):
        for host in re.findall(r"(?:http://|[\[\s\"'])([a-z-]+):(?:\d{4,5})\b", path.read_text()):
            assert host in services | {"localhost"}, f"{path.name}: {host}"


def test_prometheus_configuration():
    command = [promtool.tool("promtool"), "check", "config", "--syntax-only", str(COMPOSE / "prometheus.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_alertmanager_configuration():
    command = [promtool.tool("amtool"), "check-config", str(COMPOSE / "alertmanager.yml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    names = {p.stem for p in (ROOT / "docs" / "runbooks").glob("*.md")}
    for rule in load(COMPOSE / "alertmanager.yml")["inhibit_rules"]:
        for matcher in rule["source_matchers"] + rule["target_matchers"]:
            pattern = matcher.split('"')[1]
            assert any(re.fullmatch(pattern, name) for name in names), matcher


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("grafana-datasources", COMPOSE / "grafana" / "datasources" / "moe-monitor.yaml"),
        ("grafana-dashboards", ROOT / "grafana" / "provisioning" / "dashboards" / "moe-monitor.yaml"),
        ("grafana-alerting", ROOT / "grafana" / "provisioning" / "alerting" / "moe-monitor.yaml"),
    ],
)
def test_grafana_provisioning_by_schema(name, path):
    assert problems(name, load(path)) == []


def test_alerts_ask_the_data_source_that_is_provisioned():
    sources = {d["uid"] for d in load(COMPOSE / "grafana" / "datasources" / "moe-monitor.yaml")["datasources"]}
    (group,) = load(ROOT / "grafana" / "provisioning" / "alerting" / "moe-monitor.yaml")["groups"]
    used = {data["datasourceUid"] for rule in group["rules"] for data in rule["data"]}
    assert used - {"__expr__"} <= sources


def test_dashboards_lie_where_grafana_looks():
    (provider,) = load(ROOT / "grafana" / "provisioning" / "dashboards" / "moe-monitor.yaml")["providers"]
    mounts = load(COMPOSE / "compose.yaml")["services"]["grafana"]["volumes"]
    assert f"../../grafana/dashboards:{provider['options']['path']}:ro" in mounts


def test_collector_pipelines_use_what_is_configured():
    data = load(COMPOSE / "otel" / "collector.yaml")
    for pipeline in data["service"]["pipelines"].values():
        for kind, members in pipeline.items():
            assert set(members) <= set(data[kind])


@pytest.mark.parametrize("path", sorted(KUBERNETES.glob("*.yaml")), ids=lambda p: p.name)
def test_kubernetes_by_schema(path):
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        assert problems(f"kubernetes-{document['kind'].lower()}", document) == []


def test_kubernetes_rules_are_the_shipped_ones(tmp_path):
    groups = load(KUBERNETES / "prometheusrule.yaml")["spec"]["groups"]
    shipped = [group for path in sorted(promtool.RULES, reverse=True) for group in load(path)["groups"]]
    assert groups == shipped
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": groups}))
    command = [promtool.tool("promtool"), "check", "rules", str(tmp_path / "rules.yml")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_kubernetes_dashboards_are_the_shipped_ones():
    maps = list(yaml.safe_load_all((KUBERNETES / "dashboards.yaml").read_text()))
    found = {name: json.loads(text) for m in maps for name, text in m["data"].items()}
    assert found == {p.name: json.loads(p.read_text()) for p in (ROOT / "grafana" / "dashboards").glob("*.json")}
    assert all(len(json.dumps(m)) < 1_000_000 for m in maps)  # etcd's limit for an object


def test_exporter_pods_are_found_and_set_up():
    (daemon,) = yaml.safe_load_all((KUBERNETES / "exporter.yaml").read_text())
    monitors = list(yaml.safe_load_all((KUBERNETES / "podmonitor.yaml").read_text()))
    pod = daemon["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert daemon["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (monitor,) = [m for m in monitors if m["spec"]["selector"]["matchLabels"].items() <= labels.items()]
    (container,) = pod["spec"]["containers"]
    assert {e["port"] for e in monitor["spec"]["podMetricsEndpoints"]} <= {p["name"] for p in container["ports"]}
    mounted = {m["name"] for m in container["volumeMounts"]}
    assert mounted == {v["name"] for v in pod["spec"]["volumes"]}
    # The command line is one that the exporter takes.
    from moe_monitor.cli.main import _parser

    parsed = _parser("export").parse_args(container["args"])
    assert (parsed.port, parsed.dir) == (container["ports"][0]["containerPort"], "/run/moe-monitor/boards")
    from moe_monitor.settings import load as load_settings

    load_settings({e["name"]: e["value"] for e in container["env"]})


def test_dashboards_command(tmp_path, capsys):
    from moe_monitor.cli.main import main

    out = tmp_path / "assets"
    assert main(["dashboards", "--out", str(out)]) == 0
    assert "written to" in capsys.readouterr().out
    written = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    shipped = ("dashboards", "provisioning", "rules")
    there = {str(p.relative_to(ROOT / "grafana")) for n in shipped for p in (ROOT / "grafana" / n).rglob("*.*")}
    there = {name for name in there if (ROOT / "grafana" / name).is_file()}
    assert written == there | {f"runbooks/{p.name}" for p in (ROOT / "docs" / "runbooks").glob("*.md")}
    assert main(["dashboards", "--out", str(out)]) == 0  # the same again is no loss
    mine = out / "rules" / "moe-monitor-alerts.yml"
    mine.write_text("# mine\n")
    assert main(["dashboards", "--out", str(out)]) == 1
    assert "moe-monitor-alerts.yml" in capsys.readouterr().err
    assert mine.read_text() == "# mine\n"
    assert main(["dashboards", "--out", str(out), "--force"]) == 0
    assert mine.read_text() != "# mine\n"
    shutil.rmtree(out)
    (tmp_path / "file").write_text("")
    assert main(["dashboards", "--out", str(tmp_path / "file" / "x")]) == 1
    assert "cannot write to" in capsys.readouterr().err


def runbook_urls(out):
    rules = load(out / "rules" / "moe-monitor-alerts.yml")["groups"][0]["rules"]
    managed = load(out / "provisioning" / "alerting" / "moe-monitor.yaml")["groups"][0]["rules"]
    assert len(rules) == len(managed)
    urls = {r.get("alert") or r["title"]: r["annotations"]["runbook_url"] for r in rules + managed}
    assert urls == {r["title"]: r["annotations"]["runbook_url"] for r in managed}
    return urls


def test_alerts_link_to_the_runbooks_that_are_written_with_them(tmp_path, capsys):
    from moe_monitor.cli.main import main

    out = tmp_path / "a folder"
    assert main(["dashboards", "--out", str(out)]) == 0
    assert "on this machine only" in capsys.readouterr().out
    for name, url in runbook_urls(out).items():
        with urllib.request.urlopen(url) as answer:
            assert answer.read().decode().startswith(f"# {name}\n")
    command = [promtool.tool("promtool"), "check", "rules", *map(str, (out / "rules").glob("*.yml"))]
    assert subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.parametrize("base", ["https://wiki.example/moe", "https://wiki.example/moe/"])
def test_alerts_link_to_where_the_team_reads_runbooks(base, tmp_path, capsys):
    from moe_monitor.cli.main import main

    assert main(["dashboards", "--out", str(tmp_path), "--runbook-base", base]) == 0
    assert "on this machine only" not in capsys.readouterr().out
    assert runbook_urls(tmp_path) == {name: f"https://wiki.example/moe/{name}.md" for name in runbook_urls(tmp_path)}


@pytest.mark.parametrize("base", ["wiki.example/moe", "javascript:alert(1)", "https://x/{{ .Labels }}", "https://x y"])
def test_a_runbook_base_that_is_no_url_is_refused(base, tmp_path, capsys):
    from moe_monitor.cli.main import main

    assert main(["dashboards", "--out", str(tmp_path / "out"), "--runbook-base", base]) == 1
    assert "is not a URL" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
