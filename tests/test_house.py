"""The house rules of CONTRIBUTING.md that a machine can read from the source."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

TOP = Path(__file__).parent.parent
PACKAGE = TOP / "twinflow_train"
PRINTERS = (
    "metrics", "reporting", "launch", "checkpoint/__main__",
    "train", "prepare", "sample", "evaluate", "report", "export", "plan",
)  # fmt: skip
"""Who talks to the user: entry points and what they share, reports, the log. The rest returns or
raises."""

DRAWS = {
    "bernoulli", "multinomial", "normal", "poisson", "rand", "rand_like", "randint",
    "randint_like", "randn", "randn_like", "randperm",
    "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_",
    "uniform_",
}  # fmt: skip
GLOBAL_SEEDS = {"torch.manual_seed", "torch.random.manual_seed", "torch.seed", "torch.random.seed"}


@dataclass(frozen=True)
class Source:
    """One file: its name relative to the package without suffix, its text and its syntax tree."""

    name: str
    text: str
    tree: ast.Module

    @classmethod
    def of(cls, name: str, text: str) -> Source:
        """Parse text."""
        return cls(name, text, ast.parse(text, name))


Rule = Callable[[Source], Iterator[tuple[int, str]]]
"""Yields line number and message of everything in a file that breaks the rule."""


def files() -> list[Source]:
    """Read the whole package."""
    return [
        Source.of(path.relative_to(PACKAGE).with_suffix("").as_posix(), path.read_text())
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


def dotted(node: ast.expr) -> str:
    """Spell a.b.c of an attribute chain; anything else at its start becomes `?`."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, str]]:
    """Yield every call with the spelled name of what is called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, dotted(node.func)


def randomness_is_a_function_of_a_path(source: Source) -> Iterator[tuple[int, str]]:
    """No draw without a generator and no global seed, but inside `fork_rng`, which undoes it."""
    forked = {
        id(inner)
        for node in ast.walk(source.tree)
        if isinstance(node, ast.With)
        and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    for call, name in calls(source.tree):
        given = {keyword.arg for keyword in call.keywords}
        head, _, last = name.rpartition(".")
        drawn = last in DRAWS and (last.endswith("_") or head in ("torch", "nn.init", "init"))
        if drawn and "generator" not in given and id(call) not in forked:
            yield call.lineno, f"{name} without generator="
        seeds = name in GLOBAL_SEEDS or name.startswith("torch.cuda.manual_seed")
        if seeds and id(call) not in forked:
            yield call.lineno, f"{name} seeds all of the process"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Attribute) and dotted(node) in ("np.random", "numpy.random"):
            yield node.lineno, "numpy's randomness"
        if isinstance(node, ast.Import) and any(alias.name == "random" for alias in node.names):
            yield node.lineno, "the standard library's randomness"
        if isinstance(node, ast.ImportFrom) and node.module == "random":
            yield node.lineno, "the standard library's randomness"


def nothing_is_probed(source: Source) -> Iterator[tuple[int, str]]:
    """No hasattr, no getattr: a thing has a type, and the type says what it has."""
    for call, name in calls(source.tree):
        if name in ("hasattr", "getattr"):
            yield call.lineno, name


def nothing_is_caught_wholesale(source: Source) -> Iterator[tuple[int, str]]:
    """Every except names what it expects, or says on its line why it cannot."""
    lines = source.text.splitlines()
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler) or "noqa: BLE001 - " in lines[node.lineno - 1]:
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        if any(kind is None or dotted(kind) in ("Exception", "BaseException") for kind in caught):
            yield node.lineno, "broad except"


def only_some_print(source: Source) -> Iterator[tuple[int, str]]:
    """Printing is for those who talk to the user."""
    if {source.name, source.name.partition("/")[0]} & set(PRINTERS):
        return
    for call, name in calls(source.tree):
        if name == "print":
            yield call.lineno, "print"


def files_are_short(source: Source) -> Iterator[tuple[int, str]]:
    """At most 400 lines."""
    if (lines := len(source.text.splitlines())) > 400:
        yield 1, f"{lines} lines"


def functions_are_short(source: Source) -> Iterator[tuple[int, str]]:
    """At most 80 lines."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if (lines := node.end_lineno - node.lineno + 1) > 80:
                yield node.lineno, f"{node.name} has {lines} lines"


def lines_are_plain(source: Source) -> Iterator[tuple[int, str]]:
    """ASCII and at most 100 columns."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield number, "not ASCII"
        if len(line) > 100:
            yield number, f"{len(line)} columns"


def no_machine_is_named(source: Source) -> Iterator[tuple[int, str]]:
    """No absolute path of somebody's machine."""
    yield from _named(source.text)


def _named(text: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"(?<![\w.])/(?:home|Users|root|work|opt|srv|mnt|scratch)/", line):
            yield number, f"a path of one machine: {line.strip()[:60]}"


RULES: tuple[Rule, ...] = (
    randomness_is_a_function_of_a_path,
    nothing_is_probed,
    nothing_is_caught_wholesale,
    only_some_print,
    files_are_short,
    functions_are_short,
    lines_are_plain,
    no_machine_is_named,
)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule: Rule) -> None:
    found = [f"{s.name}.py:{line}: {what}" for s in files() for line, what in rule(s)]
    assert not found, "\n".join(found)


def test_the_mathematics_stays_small() -> None:
    sizes = {
        source.name: sum(1 for line in source.text.splitlines() if line.strip())
        for source in files()
        if source.name.startswith(("flow/", "objectives/"))
    }
    assert sum(sizes.values()) < 700, sizes


def test_the_loop_fits_on_a_page() -> None:
    for source in files():
        for node in source.tree.body:
            if source.name == "loop" and isinstance(node, ast.FunctionDef) and node.name == "train":
                code = [line for line in ast.unparse(node).splitlines() if line.strip()]
                assert len(code) <= 60


def test_no_text_file_names_a_machine() -> None:
    folders = ("conf", "data", "docker", "docs", "launch", "tests")
    paths = [path for folder in folders for path in (TOP / folder).rglob("*") if path.is_file()]
    paths += [path for path in TOP.glob("*") if path.suffix in (".md", ".toml")]
    suffixes = (".md", ".toml", ".py", ".sh", ".sbatch", ".yaml", ".json")
    found = [
        f"{path.relative_to(TOP)}:{line}: {what}"
        for path in paths
        if path.suffix in suffixes and path.name != Path(__file__).name
        for line, what in _named(path.read_text())
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (randomness_is_a_function_of_a_path, "flow/a", "torch.rand(3)"),
        (randomness_is_a_function_of_a_path, "flow/a", "x.normal_()"),
        (randomness_is_a_function_of_a_path, "flow/a", "nn.init.normal_(w)"),
        (randomness_is_a_function_of_a_path, "flow/a", "torch.manual_seed(0)"),
        (randomness_is_a_function_of_a_path, "flow/a", "np.random.default_rng(0)"),
        (randomness_is_a_function_of_a_path, "flow/a", "import random"),
        (nothing_is_probed, "loop", "hasattr(x, 'y')"),
        (nothing_is_probed, "loop", "getattr(x, 'y', None)"),
        (nothing_is_caught_wholesale, "loop", "try:\n    f()\nexcept:\n    pass"),
        (nothing_is_caught_wholesale, "loop", "try:\n    f()\nexcept (E, Exception):\n    pass"),
        (only_some_print, "flow/a", "print(1)"),
        (files_are_short, "loop", "x = 1\n" * 401),
        (functions_are_short, "loop", "def f():\n" + "    x = 1\n" * 80),
        (lines_are_plain, "loop", "x = 1  # \u00e4"),
        (lines_are_plain, "loop", "# " + "x" * 99),
        (no_machine_is_named, "loop", "x = '/home/me/data'"),
    ],
)
def test_a_broken_rule_is_found(rule: Rule, name: str, text: str) -> None:
    assert list(rule(Source.of(name, text)))


@pytest.mark.parametrize(
    ("rule", "name", "text"),
    [
        (randomness_is_a_function_of_a_path, "flow/a", "torch.rand(3, generator=g)"),
        (randomness_is_a_function_of_a_path, "flow/a", "torch.Generator().manual_seed(0)"),
        (
            randomness_is_a_function_of_a_path,
            "models/a",
            "with torch.random.fork_rng():\n    torch.manual_seed(0)\n    net = Net()",
        ),
        (nothing_is_caught_wholesale, "loop", "try:\n    f()\nexcept OSError:\n    pass"),
        (only_some_print, "reporting/table", "print(1)"),
        (no_machine_is_named, "loop", "x = 'https://example.org/home/me'"),
    ],
)
def test_what_keeps_a_rule_passes(rule: Rule, name: str, text: str) -> None:
    assert not list(rule(Source.of(name, text)))
