"""What the dashboards share: uids, variables, links to each other, annotations."""

from __future__ import annotations

from typing import Any

from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.models import dashboard as models

from moe_assets.panels import PROMETHEUS

#: uid -> title, in the order of the links. The uids are in alerts and bookmarks: they never change.
DASHBOARDS = {
    "moe-monitor-overview": "MoE / 1 Overview",
    "moe-monitor-layers": "MoE / 2 Layers and experts",
    "moe-monitor-ranks": "MoE / 3 Expert parallelism",
    "moe-monitor-latency": "MoE / 4 Latency",
    "moe-monitor-requests": "MoE / 5 Requests",
    "moe-monitor-self": "MoE / 6 The monitor itself",
    "moe-monitor-runbooks": "MoE / 7 Runbooks",
}

TAG = "moe-monitor"

_ALL = models.VariableOption(selected=True, text="All", value="$__all")


def _variable(name: str, label: str, query: str, *, several: bool, description: str) -> builders.QueryVariable:
    made = builders.QueryVariable(name).label(label).description(description).query(query).datasource(PROMETHEUS)
    made = made.refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.NUMERICAL_ASC)
    made = made.multi(several).include_all(several)
    return made.current(_ALL).all_value(".*") if several else made


def variables(*, one_model: bool, layer: str, server: bool, kind: bool) -> list[Any]:
    """``layer``: "one", "several" or "" (none); ``server``: also one server, for what is shown of one only; ``kind``:
    also a kind of steps, decode or prefill.
    """
    found = 'moe_monitor_active{job="$job"'
    source = builders.DatasourceVariable("datasource").label("Data source").type("prometheus")
    made: list[Any] = [
        source,
        _variable(
            "job",
            "Scrape job",
            "label_values(moe_monitor_active, job)",
            several=False,
            description="Servers scraped directly and through `moe-monitor export` show the same "
            "tokens: one at a time.",
        ),
        _variable(
            "model",
            "Model",
            f"label_values({found}}}, model_name)",
            several=not one_model,
            description="Served model name.",
        ),
        _variable(
            "instance",
            "Server",
            f'label_values({found},model_name=~"$model"}}, instance)',
            several=True,
            description="Scraped address.",
        ),
        _variable(
            "engine",
            "Engine",
            f'label_values({found},model_name=~"$model",instance=~"$instance"}}, engine)',
            several=True,
            description="Data-parallel replica inside a server, as vLLM numbers them.",
        ),
    ]
    if layer:
        layers = 'label_values(model_layer:moe_load_imbalance:max5m{job="$job",model_name=~"$model"}, layer)'
        about = "Model layer index, counted from 0 over all layers of the model."
        made.append(_variable("layer", "Layer", layers, several=layer == "several", description=about))
    if server:
        query = f'label_values({found},model_name=~"$model"}}, instance)'
        about = "The server whose experts are shown one by one."
        made.append(_variable("server", "One server", query, several=False, description=about))
    if kind:
        query = 'label_values(model_layer:moe_layer_duration_seconds:mean5m{job="$job",model_name=~"$model"}, kind)'
        about = "Steps that only decode, or steps with prompt tokens."
        made.append(_variable("kind", "Steps", query, several=False, description=about))
    return made


def link(uid: str, **values: str) -> str:
    """A link to another dashboard that keeps time and the choice of job and model."""
    kept = "&".join(f"var-{k}={v}" for k, v in {"job": "${job}", "model": "${model}"}.items() if k not in values)
    given = "".join(f"&var-{k}={v}" for k, v in values.items())
    return f"/d/{uid}?${{__url_time_range}}&{kept}{given}"


def same_but_layer(uid: str, *more: str) -> str:
    """A link from a table's row to the same dashboard: its layer chosen, all else kept, ``more`` variables too."""
    kept = "&".join(f"${{{name}:queryparam}}" for name in ("job", "model", "instance", "engine", "server", *more))
    return f"/d/{uid}?${{__url_time_range}}&{kept}&var-layer=${{__data.fields.Layer}}"


def dashboard(
    uid: str,
    description: str,
    *,
    one_model: bool = False,
    layer: str = "",
    server: bool = False,
    kind: bool = False,
) -> builders.Dashboard:
    made = builders.Dashboard(DASHBOARDS[uid]).uid(uid).description(description).tags([TAG])
    made = made.time("now-3h", "now").refresh("30s").timezone("browser").editable().version(1)
    made = made.tooltip(models.DashboardCursorSync.CROSSHAIR).variables(
        variables(one_model=one_model, layer=layer, server=server, kind=kind)
    )
    others = builders.DashboardLink("MoE dashboards").type(models.DashboardLinkType.DASHBOARDS).tags([TAG])
    made = made.link(others.as_dropdown(True).include_vars(True).keep_time(True))
    firing = builders.AnnotationQuery().name("Alerts").datasource(PROMETHEUS).enable(True).icon_color("red")
    firing = firing.expr('max by (alertname, model_name) (ALERTS{alertstate="firing",component="moe-monitor"})')
    annotation = firing.build()
    return made.annotation(_Titled(annotation))  # type: ignore[arg-type]


class _Titled:
    """The SDK's annotation with the fields that Prometheus annotations have and the SDK does not know."""

    def __init__(self, annotation: models.AnnotationQuery) -> None:
        self._annotation = annotation

    def build(self) -> Any:
        annotation = self._annotation

        class WithTitle:
            def to_json(self) -> dict[str, object]:
                titles = {"titleFormat": "{{alertname}}", "textFormat": "{{model_name}}", "step": "30s"}
                return annotation.to_json() | titles

        return WithTitle()
