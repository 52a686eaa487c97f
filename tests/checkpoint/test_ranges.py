"""The files are safetensors, as the library reads and writes them, and any range is read alone."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from twinflow_train.checkpoint import ranges
from twinflow_train.checkpoint.ranges import TYPES, DamageError, Piece, RangeFile, header
from twinflow_train.place import Place


def piece(values: Tensor, begin: int) -> Piece:
    return Piece(
        shape=(len(values),), dtype=values.dtype, offset=0, length=len(values), begin=begin
    )


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a file with our header."""
    pieces, end = {}, 0
    for key, values in tensors.items():
        pieces[key] = piece(values, end)
        end = pieces[key].end
    body = [values.view(torch.uint8).numpy().tobytes() for values in tensors.values()]
    Place.of(path).write([header(pieces), *body])


def numbers(length: int, dtype: torch.dtype) -> Tensor:
    return torch.arange(length).remainder(100).to(dtype)


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    wide = sorted(TYPES.values(), key=lambda dtype: -dtype.itemsize)
    tensors = {str(dtype): numbers(3 + n, dtype) for n, dtype in enumerate(wide)}
    write(tmp_path / "a", tensors)
    found = load_file(tmp_path / "a")
    assert found.keys() == tensors.keys()
    for key, values in tensors.items():
        assert found[key].dtype == values.dtype
        assert torch.equal(found[key], values)


@pytest.mark.parametrize("dtype", list(TYPES.values()))
def test_we_read_what_the_library_writes(tmp_path: Path, dtype: torch.dtype) -> None:
    values = numbers(50, dtype)
    save_file({"a": values, "b": values[:7].clone()}, tmp_path / "a", metadata={"any": "thing"})
    with RangeFile.open(Place.of(tmp_path / "a")) as opened:
        assert opened.tensors.keys() == {"a", "b"}
        (found,) = opened.parts("a", 13, 29)
        assert found.dtype == dtype
        assert torch.equal(found, values[13:29])


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from([4, 12, 1 << 20]))
def test_any_range_in_parts_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, one: int, other: int, chunk: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "ranges.safetensors"
    values = torch.arange(40.0)
    if not path.exists():
        save_file({"before": torch.ones(3), "a": values}, path)
    with pytest.MonkeyPatch.context() as patch, RangeFile.open(Place.of(path)) as opened:
        patch.setattr(ranges, "CHUNK", chunk)
        start, stop = sorted((one, other))
        parts = list(opened.parts("a", start, stop))
    assert all(len(part) * 4 <= chunk for part in parts)
    assert torch.equal(torch.cat([torch.empty(0), *parts]), values[start:stop])


def entry(**changes: object) -> bytes:
    """Give a header of one tensor of two float32 numbers, with something changed."""
    good = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    text = json.dumps({"a": good | changes}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x02",
        (1 << 62).to_bytes(8, "little"),
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{",
        (9).to_bytes(8, "little") + b"\xff\xfe not it",
        (5).to_bytes(8, "little") + b"{'a'}",
        b"\x80\x04\x95\x10\x00\x00\x00\x00" + b"cposix\nsystem\n",
        entry(dtype="F99"),
        entry(dtype=["F32"]),
        entry(shape=[3]),
        entry(shape=["2"]),
        entry(data_offsets=[0, 16], shape=[4]),
        entry(data_offsets=[-8, 0]),
        entry(data_offsets=[8, 0], shape=[-2]),
        entry(data_offsets=[0.0, 8.0]),
        entry(data_offsets=[0]),
        entry(data_offsets=None),
    ],
)
def test_what_is_no_header_is_damage(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    with (
        pytest.raises(DamageError, match="a is no safetensors file"),
        RangeFile.open(Place.of(tmp_path / "a")),
    ):
        raise AssertionError("it was opened")


def test_a_good_header_is_read(tmp_path: Path) -> None:
    """Or the refusals above say nothing."""
    (tmp_path / "a").write_bytes(entry())
    with RangeFile.open(Place.of(tmp_path / "a")) as opened:
        assert opened.tensors.keys() == {"a"}


def test_a_file_that_shrinks_while_it_is_read_is_damage(tmp_path: Path) -> None:
    save_file({"a": torch.ones(100_000)}, tmp_path / "a")
    with RangeFile.open(Place.of(tmp_path / "a")) as opened:
        (tmp_path / "a").write_bytes(b"")
        with pytest.raises(DamageError, match="ends in the middle of a"):
            list(opened.parts("a", 0, 100_000))


UNPICKLERS = {"pickle", "_pickle", "marshal", "dill", "cloudpickle", "joblib", "shelve"}
LOADS = {"load", "loads", "full_load", "unsafe_load", "read_pickle"}
HARMLESS = {"json.loads", "safetensors.torch.load", "load", "Evaluation.load", "Judge.load"}
"""Calls by names that unpickle elsewhere: `load` decodes a picture, the classes read JSON."""


WITHOUT_WEIGHTS = ("Tokenizer", "Processor")
"""Classes whose files are JSON and text."""
PUBLISHED = {
    # OpenUni is published as a pickle: tests/models/test_openuni.py holds that it executes nothing.
    "models/joined.py": {"pickle", "torch.load"},
    # Inception, with the resizing that published distances have, is a TorchScript program.
    "models/features.py": {"torch.jit.load", "prepare.from_pretrained"},
}
"""What is read in the form that others gave it."""


def harmful(source: str) -> set[str]:
    """Name what a source could execute data with: modules, calls and their settings."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names} & UNPICKLERS
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module.partition(".")[0]} & UNPICKLERS
            if node.module.partition(".")[0] in ("torch", "numpy", "pandas", "yaml"):
                found |= {alias.name for alias in node.names} & LOADS
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rpartition(".")[2]
            if last in LOADS:
                found |= {name} - HARMLESS
            if name in ("eval", "exec", "compile", "__import__"):
                found.add(name)
            if last == "from_pretrained" and not name.partition(".")[0].endswith(WITHOUT_WEIGHTS):
                # By default it takes a pickle where there are no safetensors.
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                if given.get("use_safetensors") != "True" and "gguf_file" not in given:
                    found.add(name)
    return found


def test_nothing_here_can_execute_what_it_reads() -> None:
    package = Path(ranges.__file__).parents[1]
    sources = {path: path.read_text() for path in package.rglob("*.py")}
    assert len(sources) > 40
    found = {str(p.relative_to(package)): harmful(text) for p, text in sources.items()}
    assert {path: found[path] for path in PUBLISHED} == PUBLISHED
    assert sources[package / "models/joined.py"].count("weights_only=True") == 1
    found |= {key: set() for key in PUBLISHED}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "import pickle",
        "def f():\n    from pickle import loads",
        "pandas.read_pickle(path)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "Net.from_pretrained(folder)",
        "Net.from_pretrained(folder, use_safetensors=None)",
    ],
)
def test_what_could_execute_is_found(source: str) -> None:
    assert harmful(source) != set()
