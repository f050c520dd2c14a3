"""The few kinds of panel that all dashboards are made of, on top of grafana-foundation-sdk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from grafana_foundation_sdk.builders import bargauge, heatmap, prometheus, stat, table, text, timeseries
from grafana_foundation_sdk.builders import common as common_builders
from grafana_foundation_sdk.builders import dashboard as builders
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common
from grafana_foundation_sdk.models import dashboard as models
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat
from grafana_foundation_sdk.models.text import TextMode

PROMETHEUS = models.DataSourceRef(type_val="prometheus", uid="${datasource}")

#: Matchers of the variables: of a model, of its engines, of one layer of them.
MODEL = 'job="$job",model_name=~"$model"'
ENGINE = MODEL + ',instance=~"$instance",engine=~"$engine"'

GREEN, YELLOW, ORANGE, RED, BLUE = "green", "yellow", "orange", "red", "blue"

#: Of a limit: the limit is 1.
EXCESS = [(None, GREEN), (0.7, YELLOW), (1, RED)]
TIMES = "suffix:\u00d7"  # multiplication sign

#: Load over the mean: no colour is an alarm here, what is normal differs.
LOAD_SCHEME = "RdYlBu"

Steps = Sequence[tuple[float | None, str]]


@dataclass(frozen=True)
class Query:
    """``legend`` is Grafana's format of a series' name; an instant query of a table is named by it as a column."""

    expr: str
    legend: str = ""
    instant: bool = False
    exemplars: bool = False


@dataclass
class Spec:
    """What every panel has."""

    title: str
    description: str
    queries: Sequence[Query]
    unit: str = "short"
    #: One step alone says nothing about health, so it is not green.
    steps: Steps = ((None, BLUE),)
    decimals: int | None = None
    low: float | None = None
    high: float | None = None
    no_value: str = ""
    links: Sequence[tuple[str, str]] = ()
    mappings: dict[str, tuple[str, str]] = field(default_factory=dict)
    #: At most so many points in time are asked for. Grafana itself would ask for one a pixel.
    points: int = 240


def padded(expr: str, label: str, digits: int = 2) -> str:
    """One series for each value of a numeric label, named ``row`` and padded with zeros to that many digits.

    Prometheus returns series in the order of their labels' text; only so do rows 2 and 10 come out in order.
    """
    zeros = "0" * (digits - 1)
    made = f'label_replace({expr}, "row", "{zeros}$1", "{label}", "(.+)")'
    made = f'label_replace({made}, "row", "$1", "row", "0*(.{{{digits},}})")'
    return f"max by (row) ({made})"


def _thresholds(steps: Steps) -> builders.ThresholdsConfig:
    made = [models.Threshold(value=value, color=color) for value, color in steps]
    return builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(made)


def _common(panel: Any, spec: Spec, form: PromQueryFormat | None = None) -> Any:
    panel = panel.title(spec.title).description(spec.description).datasource(PROMETHEUS).unit(spec.unit)
    panel = panel.thresholds(_thresholds(spec.steps))
    if spec.decimals is not None:
        panel = panel.decimals(spec.decimals)
    if spec.low is not None:
        panel = panel.min(spec.low)
    if spec.high is not None:
        panel = panel.max(spec.high)
    if spec.no_value:
        panel = panel.no_value(spec.no_value)
    if spec.links:
        panel = panel.data_links([builders.DashboardLink(title).url(url) for title, url in spec.links])
    if spec.mappings:
        options = {k: models.ValueMappingResult(text=t, color=c) for k, (t, c) in spec.mappings.items()}
        panel = panel.mappings([models.ValueMap(options=options)])
    for letter, query in zip("ABCDEFGHIJKLMNOP", spec.queries, strict=False):
        made = prometheus.Dataquery().expr(query.expr).ref_id(letter).datasource(PROMETHEUS)
        made = made.legend_format(query.legend or "__auto")
        if query.instant:
            made = made.instant()
        else:
            made, panel = made.range(), panel.max_data_points(spec.points)
        if query.exemplars:
            made = made.exemplar(True)
        if form is not None:
            made = made.format(form)
        panel = panel.with_target(made)
    return panel


def _last() -> common_builders.ReduceDataOptions:
    return common_builders.ReduceDataOptions().calcs(["lastNotNull"])


def number(spec: Spec, *, spark: bool = True) -> Any:
    """One number, coloured by its thresholds."""
    mode = common.BigValueGraphMode.AREA if spark else common.BigValueGraphMode.NONE
    panel = _common(stat.Panel(), spec).graph_mode(mode).reduce_options(_last())
    return panel.color_mode(
        common.BigValueColorMode.BACKGROUND if len(spec.steps) > 1 else common.BigValueColorMode.VALUE
    )


def lines(spec: Spec, *, stacked: bool = False) -> Any:
    """Lines over time; thresholds above the first are drawn as dashed lines."""
    panel = _common(timeseries.Panel(), spec).line_width(2).fill_opacity(8).show_points(common.VisibilityMode.NEVER)
    legend = common_builders.VizLegendOptions().display_mode(common.LegendDisplayMode.TABLE)
    legend = legend.placement(common.LegendPlacement.BOTTOM).show_legend(True).calcs(["lastNotNull", "max"])
    tooltip = (
        common_builders.VizTooltipOptions().mode(common.TooltipDisplayMode.MULTI).sort(common.SortOrder.DESCENDING)
    )
    panel = panel.legend(legend).tooltip(tooltip)
    if len(spec.steps) > 1:
        style = common_builders.GraphThresholdsStyleConfig().mode(common.GraphTresholdsStyleMode.DASHED)
        panel = panel.thresholds_style(style)
    if stacked:
        panel = panel.stacking(common_builders.StackingConfig().mode(common.StackingMode.NORMAL)).fill_opacity(40)
    return panel


def limit_line(panel: Any, name: str, color: str) -> Any:
    """Draw the series of that name as a thin dashed line of that colour."""
    return panel.override_by_name(
        name,
        [
            models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color}),
            models.DynamicConfigValue("custom.lineStyle", {"fill": "dash", "dash": [8, 6]}),
            models.DynamicConfigValue("custom.fillOpacity", 0),
            models.DynamicConfigValue("custom.lineWidth", 1),
        ],
    )


def right_axis(panel: Any, name: str, unit: str, color: str, low: float) -> Any:
    """Draw the series of that name by an axis of its own on the right."""
    return panel.override_by_name(
        name,
        [
            models.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": color}),
            models.DynamicConfigValue("custom.axisPlacement", "right"),
            models.DynamicConfigValue("custom.fillOpacity", 0),
            models.DynamicConfigValue("unit", unit),
            models.DynamicConfigValue("min", low),
        ],
    )


def rows_over_time(
    spec: Spec, label: str, *, scheme: str = LOAD_SCHEME, reverse: bool = True, buckets: bool = False
) -> Any:
    """A heat map of one series a row (or, ``buckets``, of a histogram); colour from ``low`` to ``high``."""
    color = _colors(spec, scheme, reverse=reverse)
    axis = heatmap.YAxisConfig().axis_label(label).unit(spec.unit if buckets else "short")
    panel = (
        _common(heatmap.Panel(), spec, PromQueryFormat.HEATMAP if buckets else None)
        .calculate(False)
        .color(color)
        .y_axis(axis)
        .cell_gap(0)
        .show_legend()
    )
    if not buckets:  # by default cells of value 0 are left out, but a silent expert is what one looks for
        panel = panel.filter_values(heatmap.FilterValueRange().le(-1))
    cells = heatmap.CellValues().unit("short" if buckets else spec.unit)
    return panel.cell_values(cells).show_tooltip()


def _colors(spec: Spec, scheme: str, *, reverse: bool) -> heatmap.HeatmapColorOptions:
    color = heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme(scheme).steps(64).reverse(reverse)
    if spec.low is not None:
        color = color.min(spec.low)
    if spec.high is not None:
        color = color.max(spec.high)
    return color


def bars(spec: Spec) -> Any:
    """Horizontal bars, one a series."""
    panel = _common(bargauge.Panel(), spec).orientation(common.VizOrientation.HORIZONTAL).reduce_options(_last())
    return panel.display_mode(common.BarGaugeDisplayMode.BASIC).show_unfilled(True)


@dataclass(frozen=True)
class Column:
    """One query of a table: its heading, unit, thresholds (coloured cell) and decimals."""

    expr: str
    heading: str
    unit: str = "short"
    steps: Steps = ()
    decimals: int = 2
    mappings: dict[str, tuple[str, str]] = field(default_factory=dict)


def joined(
    title: str,
    description: str,
    keys: Sequence[tuple[str, str]],
    columns: Sequence[Column],
    sort: str,
    links: Sequence[tuple[str, str]] = (),
    *,
    ascending: bool = False,
) -> Any:
    """A table of instant queries with the same labels ``keys`` (label, heading), one row for each set of them.

    Grafana merges rows only where all fields that they share are equal, a metric's name among them: so the queries
    keep no other labels than the keys.
    """
    by = ", ".join(label for label, _ in keys)
    queries = [Query(_by(by, c.expr), c.heading, instant=True) for c in columns]
    panel = _common(table.Panel(), Spec(title, description, queries, links=links), PromQueryFormat.TABLE)
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="merge", options={}))
    letters = "ABCDEFGHIJKLMNOP"
    names = dict(keys)
    values = [f"Value #{letter}" for letter in letters[: len(columns)]] if len(columns) > 1 else ["Value"]
    names |= {value: c.heading for value, c in zip(values, columns, strict=True)}
    order = {name: i for i, name in enumerate(names)}
    organise = {"renameByName": names, "indexByName": order, "excludeByName": {"Time": True}}
    keep = {"include": {"names": list(names)}}
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="filterFieldsByName", options=keep))
    panel = panel.with_transformation(models.DataTransformerConfig(id_val="organize", options=organise))
    for column in columns:
        panel = panel.override_by_name(column.heading, _cell(column))
    return panel.sort_by([common_builders.TableSortByFieldState().display_name(sort).desc(not ascending)])


def _by(labels: str, expr: str) -> str:
    """``expr`` with these labels only."""
    return expr if re.match(rf"\w+ by \({re.escape(labels)}\) \(", expr) else f"max by ({labels}) ({expr})"


def _cell(column: Column) -> list[models.DynamicConfigValue]:
    made = [
        models.DynamicConfigValue("unit", column.unit),
        models.DynamicConfigValue("decimals", column.decimals),
    ]
    if column.steps:
        steps = [{"value": value, "color": color} for value, color in column.steps]
        made.append(models.DynamicConfigValue("thresholds", {"mode": "absolute", "steps": steps}))
    if column.steps or column.mappings:
        made.append(models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}))
    if column.mappings:
        options = {k: {"text": t, "color": c} for k, (t, c) in column.mappings.items()}
        made.append(models.DynamicConfigValue("mappings", [{"type": "value", "options": options}]))
    return made


def matrix(spec: Spec, row: str, column: str) -> Any:
    """One coloured cell for each pair of labels of a single instant query."""
    panel = _common(table.Panel(), spec, PromQueryFormat.TABLE).cell_height(common.TableCellHeight.SM)
    numbers = [{"targetField": name, "destinationType": "number"} for name in (row, column)]
    steps: list[tuple[str, dict[str, Any]]] = [
        ("convertFieldType", {"fields": {}, "conversions": numbers}),
        ("sortBy", {"fields": {}, "sort": [{"field": column}]}),
        ("groupingToMatrix", {"rowField": row, "columnField": column, "valueField": "Value", "emptyValue": "null"}),
        ("sortBy", {"fields": {}, "sort": [{"field": f"{row}\\{column}"}]}),
    ]
    for name, options in steps:
        panel = panel.with_transformation(models.DataTransformerConfig(id_val=name, options=options))
    panel = panel.color_scheme(builders.FieldColor().mode(models.FieldColorModeId.CONTINUOUS_BL_YL_RD))
    cells = [
        models.DynamicConfigValue("custom.cellOptions", {"type": "color-background", "mode": "basic"}),
        models.DynamicConfigValue("custom.width", 34),
        models.DynamicConfigValue("custom.minWidth", 22),
    ]
    panel = panel.override_by_regexp(r"^\d+$", cells)
    return panel.override_by_name(f"{row}\\{column}", [models.DynamicConfigValue("custom.width", 60)])


def words(title: str, content: str) -> Any:
    return text.Panel().title(title).mode(TextMode.MARKDOWN).content(content)


@dataclass(frozen=True)
class Row:
    """Panels beside each other, each with its width of 24, all of one height."""

    title: str
    height: int
    panels: Sequence[tuple[Any, int]]


def assemble(dashboard: builders.Dashboard, rows: Iterable[Row]) -> dict[str, Any]:
    """Lay the rows out and return the dashboard as JSON-able data. A row without a title has no heading."""
    y, number_ = 0, 0
    for row in rows:
        if row.title:
            number_ += 1
            heading = builders.Row(row.title).grid_pos(models.GridPos(h=1, w=24, x=0, y=y)).id(number_)
            dashboard = dashboard.with_row(heading)
            y += 1
        x = 0
        for panel, width in row.panels:
            number_ += 1
            dashboard = dashboard.with_panel(
                panel.grid_pos(models.GridPos(h=row.height, w=width, x=x, y=y)).id(number_)
            )
            x += width
        assert x <= 24, row.title
        y += row.height
    made: dict[str, Any] = json.loads(json.dumps(dashboard.build(), cls=JSONEncoder, sort_keys=True))
    return made
