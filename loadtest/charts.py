"""The race as a picture: one panel of bars for each scenario, for a page 800 pixels wide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import median

from loadtest.results import Rounds, ratio, reference_of

# Inches, and pixels an inch: twice 800 across, so that it is sharp on a fine screen too.
WIDTH, RESOLUTION = 8.0, 200
LINE, MARGIN = 0.2, 0.62  # inches

OURS, THEIRS, BARE = "#2b6cb0", "#a0aec0", "#e2c27c"
NO_APPLICATION = "nginx"


def draw(path: Path, results: Mapping[str, Rounds], titles: Mapping[str, tuple[str, str]]) -> None:
    """Write *results* to *path* as a PNG; *titles* gives each scenario's title and unit."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("--chart needs matplotlib: pip install 'prefork[charts]'") from None
    heights = [len(rounds) * LINE + MARGIN for rounds in results.values()]
    figure = Figure(figsize=(WIDTH, sum(heights)), dpi=RESOLUTION, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (scenario, rounds) in zip(panels, results.items(), strict=True):
        _panel(panel, *titles[scenario], rounds)
    canvas.print_png(str(path))


def _panel(panel, title: str, unit: str, rounds: Rounds) -> None:
    reference = reference_of(rounds)
    names = sorted(rounds, key=lambda name: median(sample.rate for sample in rounds[name]))
    rates = [median(sample.rate for sample in rounds[name]) for name in names]
    colors = [OURS if name.startswith("prefork") else BARE if name == NO_APPLICATION else THEIRS for name in names]
    drawn = panel.barh(names, rates, color=colors, height=0.75)
    labels = [
        f" {rate:,.0f}   {ratio(rounds[name], rounds[reference]):.2f} x"
        for name, rate in zip(names, rates, strict=True)
    ]
    panel.bar_label(drawn, labels=labels, fontsize=8)
    panel.set_title(f"{title}: {unit}, and to {reference}", fontsize=9, loc="left", fontweight="bold")
    panel.set_xlim(0, max(rates) * 1.25)
    panel.margins(y=0.02)
    panel.tick_params(axis="y", labelsize=8, length=0)
    panel.set_xticks([])
    panel.spines[["top", "right", "bottom"]].set_visible(False)
