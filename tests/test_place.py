"""Places behave alike on a disk and behind a URL, and say what is wrong in one line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.checkpoint.tools import ALONE, Plainly
from tests.helpers import spawn
from twinflow_train.checkpoint import refuse_unusable
from twinflow_train.checkpoint.inspecting import look
from twinflow_train.dist import World
from twinflow_train.errors import UserError
from twinflow_train.place import PATIENCE, Place, cause

SHA_OF_ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.fixture(params=["path", "file", "memory"])
def top(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A folder, given in three ways."""
    yield {
        "path": f"{tmp_path}/a b",
        "file": f"file://{tmp_path}/a b",
        "memory": f"memory:/{tmp_path}/a b",
    }[request.param]
    MemoryFileSystem.store.clear()


def test_the_verbs_do_the_same_everywhere(top: str) -> None:
    place = Place.of(top)
    assert (place.names(), place.exists()) == ([], False)
    place.make()
    place.make()
    assert (place / "b").write([b"a", memoryview(b"bc")]) == SHA_OF_ABC
    (place / "c").make()
    (place / "c" / "d").write([b""])
    assert place.names() == ["b", "c"]
    assert ((place / "b").read(), (place / "b").sha256()) == (b"abc", SHA_OF_ABC)
    with (place / "b").reader() as reader:
        assert reader.size() == 3
        assert [bytes(reader.read(*of)) for of in ((1, 3), (0, 1), (2, 9))] == [b"bc", b"a", b"c"]
    (place / "b").write([b"z"])
    assert (place / "b").read() == b"z"
    for name in ("c", "b", "nothing"):
        (place / name).remove()
    assert place.names() == []
    with pytest.raises(FileNotFoundError):
        (place / "b").read()
    assert str(place / "x") == f"{top}/x"
    assert (place / "x").name == "x"


def test_a_run_is_saved_and_resumed_everywhere(top: str) -> None:
    Plainly.open(top).save(1, 2)
    place = Place.of(top)
    assert place.names() == ["step-00000001", "step-00000002"]
    assert [look(place / name, bytewise=True).fault for name in place.names()] == ["", ""]
    run = Plainly.open(top)
    assert run.saves.resume(must=True)
    assert (run.progress.step, run.state.values()) == (2, {2.0})
    (place / "step-00000002" / "rank-00000.safetensors").write([b"damaged"])
    assert run.saves.resume()
    assert (run.progress.step, run.state.values()) == (1, {1.0})
    run.save(2)
    assert look(place / "step-00000002", bytewise=True).fault == ""


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("s3://bucket/run", ["s3://bucket/run", "Install s3fs"]),
        ("gs://bucket/run", ["gcsfs"]),
        ("abfs://box/run", ["adlfs"]),
        ("nope://a/b", ["nope://a/b", "Protocol not known: nope"]),
    ],
)
def test_what_no_driver_is_there_for_is_named(where: str, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        Place.of(where)
    assert all(word in str(raised.value) for word in words)
    assert "\n" not in str(raised.value)


def test_credentials_are_not_shown() -> None:
    place = Place.of("memory://user:secret@host/run?token=secret2")
    assert "secret" not in str(place / "step-00000001")


def test_a_cause_is_told_in_few_words() -> None:
    assert cause(OSError(28, "No space left on device", "/a/b")) == "No space left on device"
    assert cause(ValueError("two\n lines")) == "two lines"
    assert cause(FileNotFoundError("https://host/a")) == "No such file"
    assert cause(TimeoutError()) == f"no answer in {PATIENCE} seconds"
    assert cause(PermissionError()) == "PermissionError"


def test_a_cause_has_no_credentials() -> None:
    error = OSError("403, url='https://user:secret@host/a?X-Amz-Signature=secret2&part=1'")
    assert "secret" not in cause(error)
    assert "host/a" in cause(error)


# Before a run


def test_a_place_is_tried_before_the_run(top: str) -> None:
    refuse_unusable(top, empty=True, world=ALONE)
    assert Place.of(top).names() == []
    Plainly.open(top).save(1)
    refuse_unusable(top, empty=False, world=ALONE)
    with pytest.raises(UserError, match=r"checkpoints=.*holds an earlier run.*resume=never"):
        refuse_unusable(top, empty=True, world=ALONE)


@pytest.mark.parametrize("where", ["/proc/self/fd/run", "/sys/run", "/dev/null/run"])
def test_a_place_that_cannot_be_written_is_named(where: str) -> None:
    with pytest.raises(UserError, match=rf"checkpoints={where} cannot be written: .*choose"):
        refuse_unusable(where, empty=False, world=ALONE)


def only_here(world: World, good: str) -> str:
    """Try a place that only rank 1 cannot write."""
    try:
        refuse_unusable("/dev/null/run" if world.rank else good, empty=False, world=world)
    except UserError as error:
        return str(error)
    return ""


def test_all_ranks_are_refused_what_one_cannot_write(tmp_path: Path) -> None:
    one, other = spawn(only_here, 2, str(tmp_path))
    assert one == other
    assert "checkpoints=/dev/null/run cannot be written: Not a directory" in one


def test_drivers_are_those_of_the_registry() -> None:
    """What the messages promise is what fsspec knows."""
    assert {"s3", "gs", "abfs", "file", "memory"} <= set(fsspec.available_protocols())
