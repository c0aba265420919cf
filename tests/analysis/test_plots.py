"""The plots of analysis/plots.py: what they show, and that it fits."""

from __future__ import annotations

import io
import re

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from PIL import Image

from analysis import plots
from analysis.curves import COLLAPSE, CURVES


def axes_of(figure: Figure) -> Axes:
    (axes,) = figure.axes
    return axes


def test_plot_of_entropies_has_a_dot_for_each_head() -> None:
    axes = axes_of(plots.entropy_plot([[0.5, 3.5], [2.0, 2.5, 3.0]], [4.0, 5.0], (1, 1)))
    dots, means = axes.lines
    assert np.asarray(dots.get_xydata()).tolist() == [[0, 0.5], [0, 3.5], [1, 2.0], [1, 2.5], [1, 3.0]]
    assert np.asarray(means.get_xydata()).tolist() == [[0, 2.0], [1, 2.5]]
    (uniform,) = axes.collections
    assert isinstance(uniform, LineCollection)
    assert [segment.tolist() for segment in uniform.get_segments()] == [[[-0.5, 4], [0.5, 4]], [[0.5, 5], [1.5, 5]]]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("layer", "bits")
    assert [text.get_text() for text in axes.texts] == ["stage 1", "stage 2"]
    assert axes.get_ylim()[0] == 0
    assert axes.get_ylim()[1] > 5
    assert not axes_of(plots.entropy_plot([[0.0]], [0.0], (1,))).texts  # all zero, and one stage needs no name


def test_curves_have_their_points_and_a_legend_where_there_are_several() -> None:
    figure = plots.curve_plot("Loss", {"a": [(0, 4.0), (1, 2.5)], "b": [(1, 3.0)]})
    axes = axes_of(figure)
    assert [np.asarray(line.get_xydata()).tolist() for line in axes.lines] == [[[0, 4], [1, 2.5]], [[1, 3]]]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert axes.get_xlabel() == "epoch"
    assert all(float(tick).is_integer() for tick in axes.get_xticks())
    assert not plots.curve_plot("Loss", {"a": [(0, 4.0)]}).legends


def test_long_names_have_room_below_the_plot() -> None:
    for series in (CURVES | COLLAPSE).values():
        figure = plots.curve_plot(
            "Loss", {name: [(0, 1.0), (1, 2.0)] for name in series.values()}, levels={"ln K": 1.5}
        )
        figure.draw_without_rendering()
        (legend,) = figure.legends
        place, plot = legend.get_window_extent(), axes_of(figure).get_window_extent()
        assert 0 <= place.x0 < place.x1 <= figure.bbox.width
        assert 0 <= place.y0 < place.y1 < plot.y0
        assert plot.height > 0.4 * figure.bbox.height


def test_confusion_plot_has_a_number_for_each_cell() -> None:
    axes = axes_of(plots.confusion_plot(["a", "b"], ["a", "b", ""], [[3, 1, 0], [0, 0, 2]]))
    assert {text.get_position(): text.get_text() for text in axes.texts} == {(0, 0): "3", (1, 0): "1", (2, 1): "2"}
    (image,) = axes.images
    assert np.asarray(image.get_array()).tolist() == [[0.75, 0.25, 0], [0, 0, 1]]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "none"]


def test_plots_are_the_same_files_each_time() -> None:
    first, second = (plots.as_svg(plots.curve_plot("Loss", {"a": [(0, 4.0), (1, 2.5)]})) for _ in range(2))
    assert first == second
    text = first.decode()
    for words in (">Loss</text>", ">epoch</text>", ">3.0</text>"):
        assert words in text
    assert not re.search(r"\d{4}-\d{2}-\d{2}", text)  # no date
    with Image.open(io.BytesIO(plots.as_png(plots.curve_plot("Loss", {"a": [(0, 4.0)]})))) as image:
        assert image.size == (656, 416)
