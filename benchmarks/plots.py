"""Pictures of benchmarks: panels of lines or of bars in one PNG file."""

import importlib.util
import itertools
import pathlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import jax
import numpy as np

COLOURS_AND_MARKERS = "#0072b2o #d55e00s #555555X #009e73^ #cc79a7D #56b4e9v #e69f00P #332288< #882255> #999933h #000000*".split()
STYLES = [(text[:-1], text[-1]) for text in COLOURS_AND_MARKERS]
FIXED = dict(zip(("xentjax", "optax", "limit"), STYLES, strict=False))
Lines = Mapping[str, tuple[list[float], list[float]]]


class Panel(NamedTuple):
    """Lines through points, both axes logarithmic unless `linear_x`."""

    title: str
    x_label: str
    y_label: str
    lines: Lines
    linear_x: bool = False


def require() -> None:
    """Ends with a clear message where matplotlib is missing, before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib")


def lines(rows: Iterable[Mapping], name: str, x: str, y: str) -> Lines:
    """Points of each contender, without those that have no figure or, as a logarithm asks, are 0."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row[y]:
            points = found.setdefault(row[name], ([], []))
            points[0].append(row[x])
            points[1].append(row[y])
    return found


def _styles(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    free = itertools.cycle(STYLES[len(FIXED) :])
    return {name: FIXED[name] if name in FIXED else next(free) for name in dict.fromkeys(names)}


def _figure(title: str, width: float, height: float):
    from matplotlib.figure import Figure  # without pyplot there is no window system to ask for

    figure = Figure(figsize=(width, height), layout="constrained")
    device = jax.devices()[0].device_kind
    figure.suptitle(f"{title} ({'CPU' if device == 'cpu' else device}, jax {jax.__version__})", fontsize=11)
    return figure


def _write(figure, path: pathlib.Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def save(path: pathlib.Path, title: str, panels: list[Panel]) -> None:
    """Panels two to a row, one legend for all."""
    from matplotlib import ticker

    columns = min(2, len(panels))
    count = -(-len(panels) // columns)
    figure = _figure(title, 5 * columns, 0.8 + 3.2 * count)
    styles = _styles(name for panel in panels for name in panel.lines)
    handles = {}
    for axes, panel in zip(figure.subplots(count, columns, squeeze=False).flat, panels, strict=True):
        for name, (x, y) in panel.lines.items():
            colour, marker = styles[name]
            (handles[name],) = axes.plot(x, y, color=colour, marker=marker, markersize=5, zorder=3 if name == "xentjax" else 2)
        if not panel.linear_x:
            axes.set_xscale("log", base=2)
            ticks = sorted({value for x, _ in panel.lines.values() for value in x})
            axes.set_xticks(ticks, [f"{value:,}" for value in ticks])
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        if high / low < 1e4:  # numbers, at 1, 2 and 5 too, where a decade alone would leave an axis without any
            axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.title.set_fontsize(10)
        axes.grid(which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    _write(figure, path)


def save_bars(path: pathlib.Path, title: str, label: str, groups: Mapping[str, Mapping[str, float]]) -> None:
    """Ratios as horizontal bars, one for each group and series, with a line at 1."""
    series = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    figure = _figure(title, 9, 1.4 + (0.22 * len(series) + 0.16) * len(groups))
    axes = figure.subplots()
    thickness = 0.8 / len(series)
    for k, name in enumerate(series):
        places = [(g + k * thickness, bars[name]) for g, bars in enumerate(groups.values()) if name in bars]
        drawn = axes.barh([p for p, _ in places], [v for _, v in places], thickness * 0.92, color=STYLES[k % len(STYLES)][0], label=name)
        axes.bar_label(drawn, fmt="%.2f", padding=3, fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks([g + 0.4 - thickness / 2 for g in range(len(groups))], list(groups))
    axes.invert_yaxis()
    axes.margins(x=0.08)
    axes.set(xlabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(4, len(series)), frameon=False)
    _write(figure, path)


def save_grid(path: pathlib.Path, title: str, tables: Mapping[str, list[dict]]) -> None:
    """Ratios as heat maps side by side. The first column of each table names its rows; 1 is white, faster is blue, slower is red."""
    first = next(iter(tables.values()))
    figure = _figure(title, 1 + 0.8 * (len(first[0]) - 1) * len(tables), 1.6 + 0.42 * len(first))
    for axes, (name, rows) in zip(figure.subplots(1, len(tables), squeeze=False).flat, tables.items(), strict=True):
        label, *columns = rows[0]
        ratios = np.array([[row[column] for column in columns] for row in rows])
        axes.imshow(np.log2(ratios), cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto")
        for (i, j), ratio in np.ndenumerate(ratios):
            axes.text(j, i, f"{ratio:.2f}", ha="center", va="center", fontsize=8, color="white" if abs(np.log2(ratio)) > 1.4 else "black")
        axes.set_xticks(range(len(columns)), [column.split()[0] for column in columns])
        axes.set_yticks(range(len(rows)), [row[label] for row in rows])
        axes.set(title=name, xlabel="classes", ylabel=label)
        axes.title.set_fontsize(10)
    _write(figure, path)
