"""Which file may import which, and where system calls may be made; read from the sources, nothing is run."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import lingerx

PACKAGE = Path(lingerx.__file__).parent

BOTTOM = {"_machine", "policy", "report"}
"""They import nothing of ours."""

HELPERS = {"_arguments", "_ledger", "_named_tuple", "_offers", "_ownership", "_sockopt", "_status", "_tls", "_tls_way"}
"""Allowed below the engines: checks, words, values, socket options, and what TLS has to say."""

ENGINES = {"_native", "_portable"}

PARTS = {"_portable_closer", "_portable_crowd", "_portable_handed"}
"""Of the portable engine, and known to it alone. (Those of the native one are included, not imported.)"""

ADAPTERS = {
    *("_terms", "_linger_socket", "_linger_ssl_socket", "listener", "socketserver", "wsgi"),
    *("_asyncio_close", "asyncio", "_streams", "anyio", "trio"),
    *("cheroot", "gevent", "gunicorn", "hypercorn", "twisted", "uvicorn"),
}
"""They know the closer; it does not know them."""

DOORS = {"__init__", "__main__", "_lazy"}

CALLS_ALLOWED = {"_portable", *PARTS, "_sockopt", "_tls", "_tls_way", "cli"}
"""Where system calls on sockets may be made in Python; the rest of the library asks an engine."""

SYSTEM_CALLS = {"setsockopt", "shutdown", "ioctl", "fcntl"}
NO_CALLS_OF_OURS = {"self.shutdown", "closer.shutdown", "super().shutdown", "self.stream.setsockopt"}
"""Of a Closer, which is no socket; and what somebody asks an object of ours for that stands before theirs."""
SYSTEM_MODULES = {"fcntl", "select", "selectors", "_socket"}

SOURCES = sorted(PACKAGE.rglob("*.py"))

CYTHON_IMPORT = re.compile(r"^\s*(?:from (lingerx[.\w]*) c?import (.+)|c?import (lingerx[.\w]*))", re.MULTILINE)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _target(module: str, name: str) -> str:
    """Which of our files `from module import name` means; "__init__" for the package itself."""
    parts = module.split(".")[1:]
    if parts:
        return parts[0]
    is_file = (PACKAGE / f"{name}.py").exists() or (PACKAGE / name).is_dir() or name in ENGINES
    return name if is_file else "__init__"


def _ours(path: Path, tree: ast.Module) -> Iterator[str]:
    package = ["lingerx", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            if module.partition(".")[0] == "lingerx":
                yield from (_target(module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.partition(".")[0] == "lingerx"]
            yield from (_target(name, "__init__") for name in names)
        elif isinstance(node, ast.Constant) and re.fullmatch(r"lingerx\.\w+", str(node.value)):
            yield str(node.value).partition(".")[2]  # importlib.import_module("lingerx._native")


def _imports_of(path: Path) -> set[str]:
    found = set(_ours(path, ast.parse(path.read_text(encoding="utf-8"))))
    inside = {"cli"} if path.parent != PACKAGE else set()
    return found - inside


def _allowed(name: str) -> set[str]:
    upper = {_name(path) for path in SOURCES} - BOTTOM - HELPERS - ENGINES - PARTS - DOORS - {"_engine"}
    if name in BOTTOM:
        return set()
    if name in HELPERS:
        return {"policy", "report"} | HELPERS
    if name == "_native":
        return BOTTOM | HELPERS
    if name == "_portable" or name in PARTS:
        return BOTTOM | HELPERS | PARTS
    if name == "_engine":
        return HELPERS | ENGINES
    if name == "__main__":
        return {"cli"}
    if name in ADAPTERS:
        return {"policy", "report", "_engine", "closer"} | HELPERS | ADAPTERS
    if name == "cli":
        return {"__init__", "policy", "report"} | HELPERS | {"_engine"} | upper
    return {"policy", "report"} | HELPERS | {"_engine"} | (upper | {"_lazy"} if name in DOORS else upper - ADAPTERS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path: Path) -> None:
    assert _imports_of(path) <= _allowed(_name(path))


def test_the_native_engine_imports_what_an_engine_may() -> None:
    folders = (PACKAGE, Path(__file__).parents[1] / "src" / "lingerx")
    sources = [
        source for folder in folders for ending in ("pyx", "pxi") for source in folder.glob(f"_native*.{ending}")
    ]
    if not sources:
        pytest.skip("the sources of the compiled modules are not here")
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    found = set()
    for module, names, whole in CYTHON_IMPORT.findall(text):
        for name in names.split(","):
            # the compiled machine: another name for the same file
            found.add(_target(module or whole, name.split(" as ")[0].strip().replace("_machine_c", "_machine")))
    assert "_machine" in found
    assert found <= _allowed("_native")


def test_nothing_imports_in_a_circle() -> None:
    graph = {_name(path): _imports_of(path) for path in SOURCES if path.parent == PACKAGE}
    done: set[str] = set()
    while ready := {name for name, wanted in graph.items() if wanted & graph.keys() <= done} - done:
        done |= ready
    assert graph.keys() - done == set()


def _for_type_checkers(node: ast.stmt) -> list[ast.stmt]:
    """What stands in `if TYPE_CHECKING` and its else."""
    return node.body + node.orelse if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) else []


def test_the_door_has_no_logic() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        names = all(isinstance(part, (ast.ImportFrom, ast.Import)) for part in _for_type_checkers(node) or [node])
        words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        about = isinstance(node, ast.Assign | ast.Delete) and (
            ast.unparse(node.targets[0]) in ("__all__", "__version__", "TYPE_CHECKING")
        )
        assert names or words or about, ast.unparse(node)


def _system_calls(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            call = ast.unparse(node.func)
            if (node.func.attr in SYSTEM_CALLS and call not in NO_CALLS_OF_OURS) or call == "os.close":
                yield call
        elif isinstance(node, ast.ImportFrom):
            if node.level == 0 and node.module in SYSTEM_MODULES:
                yield f"from {node.module}"
        elif isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names if alias.name in SYSTEM_MODULES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_system_calls_are_made_by_engines_only(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    if _name(path) not in CALLS_ALLOWED:
        assert list(_system_calls(tree)) == []


def test_the_machine_knows_no_clock_and_no_module() -> None:
    tree = ast.parse((PACKAGE / "_machine.py").read_text(encoding="utf-8"))
    assert [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))] == []


LONGEST_FILE = 450
"""Lines; the habit is about 400."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_top_of_a_file_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
