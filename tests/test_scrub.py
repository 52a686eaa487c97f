"""Credentials are taken out of whatever a URL stands in; all else stays as it is."""

from __future__ import annotations

from typing import Any

import pytest

from twinflow_train.scrub import scrub


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("https://user:word@host/x", "https://***@host/x"),
        ("s3://word@bucket/x", "s3://***@bucket/x"),
        ("https:/user:word@host/x", "https:/***@host/x"),  # what a Path makes of it
        ("https://us@er:wo@rd@host/x", "https://***@host/x"),
        ("a https://u:w@h and git+ssh://t@h2/y", "a https://***@h and git+ssh://***@h2/y"),
        ("https://h/x?token=abc", "https://h/x?token=***"),
        ("https://h/x?a=1&X-Amz-Signature=abc&b=2", "https://h/x?a=1&X-Amz-Signature=***&b=2"),
        ("https://h/x?X-Amz-Credential=a%2Fb", "https://h/x?X-Amz-Credential=***"),
        ("https://h/x?sig=abc&se=1", "https://h/x?sig=***&se=1"),
        ("https://h/x?api_key=abc#f", "https://h/x?api_key=***"),
        ("https://h/x?PASSWORD=a", "https://h/x?PASSWORD=***"),
        ("https://h/x?access_token=a;b", "https://h/x?access_token=***"),
        ('init_from="https://u:w@h/x?token=abc"', 'init_from="https://***@h/x?token=***'),
    ],
)
def test_credentials_are_hidden(text: str, left: str) -> None:
    assert scrub(text) == left


@pytest.mark.parametrize(
    "text",
    ["", "a@b", "user@host:path", "https://host/x?page=2&size=@3", "datasets/digits/train",
     "key=value", "a photo of a cat & a key=3", "https://host/@user"],
)  # fmt: skip
def test_other_text_stays(text: str) -> None:
    assert scrub(text) == text


def test_trees_are_scrubbed_to_their_leaves_and_not_changed() -> None:
    tree: dict[str, list[Any]] = {
        "a": ["https://u:w@h", 1, None, {"b": "https://u@h"}],
        "c": [True, 0.5],
    }
    assert scrub(tree) == {
        "a": ["https://***@h", 1, None, {"b": "https://***@h"}],
        "c": [True, 0.5],
    }
    assert tree["a"][0] == "https://u:w@h"
