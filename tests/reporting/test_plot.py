"""Quality against cost, drawn."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from twinflow_train.reporting import plot


def row(model: str, nfe: int, frechet: float | None, **more: Any) -> dict[str, Any]:
    return {"model": model, "nfe": nfe, "frechet": frechet, "seconds_per_image": 0.01 * nfe} | more


def dots(drawn: Image.Image, colour: str) -> np.ndarray:
    """Return where a colour stands, (rows, 2), above the names of the models."""
    wanted = tuple(int(colour[k : k + 2], 16) for k in (1, 3, 5))
    pixels = np.array(drawn)[: plot.TOP + plot.PANEL]
    return np.argwhere((pixels == wanted).all(-1))


def test_better_and_dearer_stand_where_they_belong() -> None:
    drawn = plot.quality([row("ours", 1, 20.0), row("base", 60, 5.0)])
    assert drawn is not None
    left = plot.MARGIN + plot.PANEL + 10
    ours, base = (dots(drawn, colour) for colour in plot.COLOURS[:2])
    ours, base = (each[each[:, 1] < left] for each in (ours, base))
    assert ours[:, 1].max() < base[:, 1].min(), "fewer evaluations to the left"
    assert ours[:, 0].max() < base[:, 0].min(), "a larger distance above"
    both = dots(drawn, plot.COLOURS[0])
    assert both[:, 1].max() > left, "and again over seconds"


def test_one_point_and_equal_values_are_drawn_too() -> None:
    for rows in ([row("a", 1, 3.0)], [row("a", 1, 0.0), row("b", 2, 0.0)]):
        drawn = plot.quality(rows)
        assert drawn is not None
        assert len(dots(drawn, plot.COLOURS[0]))


def test_the_most_telling_score_is_drawn_and_none_if_there_is_none() -> None:
    assert plot.quality([row("a", 1, None)]) is None
    assert plot.quality([]) is None
    with_score = plot.quality([row("a", 1, 3.0, geneval=0.5), row("a", 2, 3.0, geneval=0.9)])
    without = plot.quality([row("a", 1, 3.0), row("a", 2, 3.0)])
    assert with_score is not None
    assert without is not None
    assert with_score.tobytes() != without.tobytes()
