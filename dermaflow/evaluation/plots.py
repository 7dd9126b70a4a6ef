"""Plots of the report, each an SVG element to stand inside a page: no file, no script, no font of its own."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

from dermaflow.evaluation.figures import ConformalFigures
from dermaflow.evaluation.metrics import ECE_BINS, calibration_bins
from dermaflow.taxonomy import CODES, MELANOMA

INK, FAINT, ACCENT = "#1c1c1c", "#9a9a9a", "#0b5394"
COLOURS: dict[str, str] = {  # Okabe and Ito 2008, "Color Universal Design": told apart with any colour vision
    "akiec": "#E69F00",
    "bcc": "#D55E00",
    "bkl": "#56B4E9",
    "df": "#009E73",
    "mel": "#000000",
    "nv": "#0072B2",
    "vasc": "#CC79A7",
}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def reliability(truth: np.ndarray, probabilities: np.ndarray) -> Markup:
    """Accuracy against confidence of the most probable class in 15 bins, above the number of images in each.

    Args:
        truth: [N] int, indices into `CODES`.
        probabilities: [N, 7].
    """
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == truth
    bins = calibration_bins(confidence)
    count = np.bincount(bins, minlength=ECE_BINS)
    full = count > 0
    mean_confidence = np.bincount(bins, confidence, ECE_BINS)[full] / count[full]
    accuracy = np.bincount(bins, correct, ECE_BINS)[full] / count[full]
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.6), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        above.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        above.vlines(mean_confidence, mean_confidence, accuracy, color=ACCENT, linewidth=1.5, alpha=0.5)
        above.plot(mean_confidence, accuracy, "o-", color=ACCENT, markersize=5, linewidth=1)
        above.set(ylabel="share called right", xlim=(0, 1), ylim=(0, 1.02))
        below.bar((np.arange(ECE_BINS) + 0.5) / ECE_BINS, count, width=0.9 / ECE_BINS, color=ACCENT)
        below.set(xlabel="probability of the most probable class", ylabel="images")
        below.set_ylim(0, count.max() * 1.3)
        for position in np.flatnonzero(full):
            below.annotate(
                str(count[position]),
                ((position + 0.5) / ECE_BINS, count[position]),
                ha="center",
                va="bottom",
                fontsize=7.5,
            )
        return _svg(figure, "Reliability diagram: accuracy against confidence, with the number of images by bin")


def roc(truth: np.ndarray, probabilities: np.ndarray) -> Markup:
    """ROC curve of each class against the rest; arguments as `reliability`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        for k in _rankable(truth):
            fpr, tpr, _ = roc_curve(truth == k, probabilities[:, k])
            axes.plot(fpr, tpr, label=CODES[k], **_line(k))
        axes.set(xlabel="1 − specificity", ylabel="sensitivity", xlim=(-0.01, 1), ylim=(0, 1.01))
        _legend(axes, "lower right")
        return _svg(figure, "ROC curve of each class against the rest")


def precision_recall(truth: np.ndarray, probabilities: np.ndarray) -> Markup:
    """Precision-recall curve of each class against the rest, with its average precision; arguments as `reliability`."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.6), layout="constrained")
        axes = figure.subplots()
        for k in _rankable(truth):
            precision, recall, _ = precision_recall_curve(truth == k, probabilities[:, k])
            average = average_precision_score(truth == k, probabilities[:, k])
            axes.plot(recall, precision, label=f"{CODES[k]}  {average:.2f}", drawstyle="steps-post", **_line(k))
        axes.set(xlabel="sensitivity (recall)", ylabel="precision", xlim=(0, 1.01), ylim=(0, 1.02))
        _legend(axes, "lower left", title="average precision")
        return _svg(figure, "Precision-recall curve of each class against the rest")


def training(history: Sequence[dict[str, float]]) -> list[Markup]:
    """Losses, and the other validation figures, over the epochs: up to two plots, none without a history."""
    losses = [name for name in ("loss", "val_loss") if any(name in row for row in history)]
    others = sorted({name for row in history for name in row if name.startswith("val_") and name != "val_loss"})
    titles = {"loss": "training", "val_loss": "validation"}
    with mpl.rc_context(_STYLE):
        return [
            _curves(history, names, label, titles)
            for names, label in ((losses, "loss"), (others, "validation figure"))
            if names
        ]


def _curves(history: Sequence[dict[str, float]], names: list[str], label: str, titles: dict[str, str]) -> Markup:
    figure = Figure(figsize=(4.8, 3.2), layout="constrained")
    axes = figure.subplots()
    palette = [ACCENT, COLOURS["bcc"], COLOURS["df"], COLOURS["vasc"], COLOURS["akiec"], COLOURS["bkl"]]
    for position, name in enumerate(names):
        rows = [(row["epoch"], row[name]) for row in history if name in row and np.isfinite(row[name])]
        title = titles.get(name, name.removeprefix("val_").replace("_", " "))
        axes.plot(*zip(*rows, strict=True), "o-", markersize=3, label=title, color=palette[position % len(palette)])
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _svg(figure, f"Training: {label} by epoch")


def lines(
    series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str, description: str, *,
    bold: str | None = None, floor: float | None = None,
) -> Markup:  # fmt: skip
    """Curves by name over rounds; one of them may be drawn in bold, and many of them are drawn alike.

    Args:
        series: Points of each curve; those that are not finite are left out.
        x: Label of the axis, whole numbers.
        y: Label of the other.
        description: For those who do not see the plot.
        bold: Name of the curve that stands out.
        floor: Where the axis begins.
    """
    styles = _styles(list(series), bold)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, points in series.items():
            shown = [(a, b) for a, b in points if np.isfinite(b)]
            if not shown:
                continue
            axes.plot(*zip(*shown, strict=True), "o-", markersize=3, **styles[name])
        axes.set(xlabel=x, ylabel=y)
        if floor is not None:
            axes.set_ylim(floor, axes.get_ylim()[1] + 0.15 * (axes.get_ylim()[1] - floor))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        return _svg(figure, description)


def reliability_by_site(bins: Mapping[str, np.ndarray], bold: str) -> Markup:
    """Accuracy against confidence of each site, from counts [15, 3] as in `crosssite.Reliability`; one site in bold."""
    styles = _styles(list(bins), bold)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1, linestyle="--")
        for name, counts in bins.items():
            full = counts[:, 0] > 0
            if not full.any():
                continue
            confidence, right = counts[full, 1] / counts[full, 0], counts[full, 2] / counts[full, 0]
            axes.plot(confidence, right, "o-", markersize=3.5, **styles[name])
        axes.set(
            xlabel="probability of the most probable class",
            ylabel="share called right",
            xlim=(0, 1),
            ylim=(-0.02, 1.02),
        )
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        return _svg(figure, "Accuracy against confidence by site")


def _styles(names: Sequence[str], bold: str | None) -> dict[str, dict[str, Any]]:
    """Colour, width and label of curves; where there are more than colours, all but the bold one are grey, unnamed."""
    palette = [COLOURS[code] for code in ("nv", "bcc", "df", "vasc", "akiec", "bkl")]
    others = [name for name in names if name != bold]
    if len(others) > len(palette):
        styles = {name: {"color": FAINT, "linewidth": 1.0, "label": f"_{name}"} for name in others}
    else:
        styles = {name: {"color": palette[k], "linewidth": 1.2, "label": name} for k, name in enumerate(others)}
    return styles | ({} if bold is None else {bold: {"color": INK, "linewidth": 2.4, "label": bold}})


def coverage(conformal: ConformalFigures) -> Markup:
    """Coverage of the conformal sets by class with intervals, against the promised one."""
    codes = list(reversed(conformal.coverage_by_class))
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 0.38 * len(codes) + 0.9), layout="constrained")
        axes = figure.subplots()
        for row, code in enumerate(codes):
            found = conformal.coverage_by_class[code]
            axes.barh(row, found.value or 0, height=0.62, color=COLOURS[code], alpha=0.55)
            if found.low is not None and found.high is not None:
                axes.plot([found.low, found.high], [row, row], color=INK, linewidth=1.5)
        axes.axvline(conformal.target, color=INK, linewidth=1.2, linestyle="--")
        axes.set_yticks(range(len(codes)), codes)
        axes.set(
            xlabel=f"share of images whose set holds the true class (promised {conformal.target:.0%})", xlim=(0, 1)
        )
        axes.grid(axis="y", visible=False)
        return _svg(figure, "Coverage of the conformal sets by class")


def _rankable(truth: np.ndarray) -> list[int]:
    """Classes that are present beside others; melanoma last, so that it is drawn on top."""
    present = np.unique(truth)
    return sorted((int(k) for k in present if len(present) > 1), key=lambda k: k == MELANOMA)


def _line(k: int) -> dict[str, Any]:
    return {"color": COLOURS[CODES[k]], "linewidth": 2.8 if k == MELANOMA else 1.3}


def _legend(axes: Axes, place: Literal["lower left", "lower right"], title: str | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:  # melanoma, drawn last, is named first
        axes.legend(handles[-1:] + handles[:-1], labels[-1:] + labels[:-1], loc=place, title=title)


def _svg(figure: Figure, description: str) -> Markup:
    """The figure as an ``<svg>`` element without fixed size, unused ids and references to the outside."""
    stream = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": description}):  # the same plot gives the same bytes
        FigureCanvasSVG(figure).print_svg(stream, metadata={"Date": None})
    text = stream.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    tag, rest = text.split(">", 1)
    text = re.sub(r' (xmlns(:\w+)?|version|width|height)="[^"]*"', "", tag) + ">" + rest
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in used else "", text)
    prefix = "p" + hashlib.sha256(description.encode()).hexdigest()[:6]  # ids stay apart on a page of many plots
    text = re.sub(r'(id="|url\(#|href="#)(?=[^)"])', rf"\g<1>{prefix}", text)
    text = text.replace("<svg", f'<svg role="img" aria-label="{description}"', 1).replace("xlink:href", "href")
    return Markup(text)  # matplotlib has escaped the words in it
