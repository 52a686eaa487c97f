"""Sets of the same encoders are mixed, whatever computed them; others are refused by name."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.data.tools import ABOUT, make_sample
from twinflow_train.data.loader import Part, Shards
from twinflow_train.data.manifest import About
from twinflow_train.data.writing import write_shards
from twinflow_train.errors import UserError
from twinflow_train.rng import generator

NULL = torch.randn(3, 6, generator=generator("null"))
WEIGHTS = replace(ABOUT, encoder="one name", revision="sha256:1234")


def nearby(error: float) -> Tensor:
    """Return the null prompt's embedding with a relative error."""
    noise = torch.randn(3, 6, generator=generator("noise"))
    return NULL + error * noise * NULL.norm() / noise.norm()


def mixture(folder: Path, null: Tensor, about: About, *, first: About = ABOUT) -> Shards:
    """Write two sets, the second of which is the one to be judged."""
    for name, embedding, said in (("one", NULL, first), ("two", null, about)):
        samples = [make_sample(n) for n in range(8)]
        write_shards(folder / name, samples, null=embedding, about=said)
    return Shards(path=str(folder / "one"), mix=[Part(path=str(folder / "two"))], prefetch=0)


def test_a_null_prompt_that_another_gpu_embedded_is_the_same(tmp_path: Path) -> None:
    """And that of the first set is shown."""
    data = mixture(tmp_path, nearby(0.03), replace(ABOUT, licence="another"))
    stream = data.stream(seed=0, batch=8)
    batches = data.batches(stream, rows=[range(8)], groups=[8], step=0)
    with closing(batches) as found:
        shown = [batch for micros in islice(found, 2) for batch in micros]
    assert all(torch.equal(batch.null.tokens[0], NULL) for batch in shown)


def test_equal_weights_are_equal_under_any_name(tmp_path: Path) -> None:
    renamed = replace(WEIGHTS, encoder="another name")
    assert len(mixture(tmp_path, NULL, renamed, first=WEIGHTS).train()) == 2


@pytest.mark.parametrize(
    ("null", "about", "said"),
    [
        (nearby(0.3), ABOUT, "its null prompt has another embedding"),
        (NULL[:2], ABOUT, "its null prompt has another embedding"),
        (NULL, replace(ABOUT, revision="1"), "its encoder is 'none@1', there 'none@0'"),
        (NULL, replace(ABOUT, encoder="other"), "its encoder is 'other@0', there 'none@0'"),
        (NULL, replace(ABOUT, null_prompt=""), "its null prompt is '', there 'Generate.'"),
    ],
)
def test_sets_of_other_encoders_are_refused(
    tmp_path: Path, null: Tensor, about: About, said: str
) -> None:
    where = r"data\.mix: .*/two is not made as .*/one: "
    with pytest.raises(UserError, match=f"{where}{said}; prepare both with the same encoders"):
        mixture(tmp_path, null, about).train()
