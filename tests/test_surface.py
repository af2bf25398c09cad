"""The public surface: names, signatures, docstrings, the choice of an engine, what an import costs, types for users."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

import lingerx

if TYPE_CHECKING:
    from conformance import Engine

DOCUMENTED = {
    *("Background", "Abort", "KernelLinger", "Flush", "Drain", "Policy", "policy_from_linger"),
    *("Report", "Outcome", "TcpStatus"),
    *("close", "close_fd", "close_all", "send_and_close", "abort", "closing"),
    *("set_linger", "get_linger", "tcp_status"),
    *("Closer", "Stats", "default_closer"),
    *("create_server", "wrap_listener", "LingerSocket", "LingerSSLSocket"),
    "engine",
}

ON_DEMAND = {"LingerSSLSocket"}
"""Found by the module's __getattr__, for their import is heavy."""

TIMES = {"timeout", "idle_timeout", "user_timeout", "seconds", "spread", "elapsed", "collect", "exit_timeout"}
"""Names of parameters and properties whose unit must be told."""

EXTRAS = {
    **{name: name for name in ("anyio", "cheroot", "gevent", "gunicorn", "hypercorn", "trio", "twisted", "uvicorn")},
    "prometheus": "prometheus_client",
}
"""The modules that need another package, and its name; the extra is called as the module."""

ADAPTERS = {*EXTRAS, "asyncio", "socketserver", "wsgi"}

HEAVY = ("asyncio", "concurrent", "ssl", "rich", "click", "dataclasses", "inspect", *EXTRAS.values())
"""Modules that cost more to import than lingerx itself, and that a program may well do without."""

PACKAGE = Path(lingerx.__file__).parent
NATIVE_IS_HERE = find_spec("lingerx._native") is not None

BLOCK_NATIVE = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name == "lingerx._native":
            raise {error}
sys.meta_path.insert(0, Blocker())
"""
MISSING = BLOCK_NATIVE.format(error='ModuleNotFoundError("no such module", name=name)')
UNUSABLE = BLOCK_NATIVE.format(error='ImportError("wrong ELF class", name=name)')
INCOMPLETE = BLOCK_NATIVE.format(error='ModuleNotFoundError("no such module", name="lingerx._machine_c")')
SHOW = "import lingerx; print(lingerx.engine, lingerx.close.__module__)"


def _run(code: str, engine: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "LINGERX_ENGINE"}
    if engine is not None:
        environment["LINGERX_ENGINE"] = engine
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def _fails(code: str, engine: str | None, sentence: str) -> None:
    done = _run(code, engine)
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert done.returncode != 0
    assert last.startswith(("ImportError: ", "ModuleNotFoundError: "))
    assert sentence in last


def test_public_names_are_the_documented_ones() -> None:
    assert set(lingerx.__all__) == DOCUMENTED
    assert list(lingerx.__all__) == sorted(DOCUMENTED)


def test_nothing_else_looks_public() -> None:
    names = {name for name, value in vars(lingerx).items() if not name.startswith("_")}
    submodules = {name for name in names if isinstance(getattr(lingerx, name), ModuleType)}
    assert names - submodules == DOCUMENTED - ON_DEMAND
    assert submodules <= {path.stem for path in PACKAGE.iterdir()}


def test_an_engine_offers_what_is_written_down(engine: Engine) -> None:
    offers = import_module("lingerx._offers").OFFERS
    found = {
        name
        for name, value in vars(engine).items()
        if not name.startswith("_")
        and callable(value)
        and not isinstance(value, type)
        and value.__module__ == engine.__name__  # type: ignore[attr-defined]
    }
    assert found == set(offers)
    assert list(offers) == sorted(offers)


def _shape(function: object) -> list[tuple[str, str, object]]:
    assert callable(function)
    parameters = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.kind.name, parameter.default) for parameter in parameters]


@pytest.mark.parametrize("name", import_module("lingerx._offers").OFFERS)
def test_an_engine_s_signatures_are_those_written_down(engine: Engine, name: str) -> None:
    written = getattr(import_module("lingerx._offers"), name)
    offered = getattr(engine, name)
    assert _shape(offered) == _shape(written)
    assert inspect.getdoc(offered) == inspect.getdoc(written)


@pytest.mark.parametrize("name", sorted(DOCUMENTED - {"engine"}))
def test_a_docstring_that_tells_the_units(name: str) -> None:
    value = getattr(lingerx, name)
    words = inspect.getdoc(value)
    assert words
    shown = set(vars(value)) if isinstance(value, type) else set()
    if name not in ("Outcome", "Report"):  # an enumeration; a compiled type, which has no signature
        shown |= set(inspect.signature(value).parameters)
    if TIMES & shown:
        assert "second" in words


@pytest.mark.parametrize("policy", [lingerx.Background, lingerx.Drain, lingerx.Flush, lingerx.KernelLinger])
def test_help_shows_the_arguments_of_a_policy(policy: type[lingerx.Policy]) -> None:
    assert tuple(inspect.signature(policy).parameters) == policy.__match_args__


@pytest.mark.parametrize(
    "name", ["Report", "Outcome", "TcpStatus", "closing", "Closer", "Stats", "LingerSocket", "LingerSSLSocket"]
)
def test_what_a_type_shows_is_documented(name: str) -> None:
    members = [value for key, value in vars(getattr(lingerx, name)).items() if not key.startswith("_")]
    assert [member for member in members if not inspect.getdoc(member)] == []


def _loaded(engine: str | None = None) -> set[str]:
    program = "import sys; before = set(sys.modules); import lingerx; print(*sorted(set(sys.modules) - before))"
    done = _run(program, engine)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_import_is_light() -> None:
    loaded = _loaded()
    assert "lingerx" in loaded
    assert loaded.isdisjoint(HEAVY)


@pytest.mark.skipif(not NATIVE_IS_HERE, reason="portable build: lingerx._native is not installed")
def test_the_native_engine_does_without_typing() -> None:
    """Which costs half as much as all of lingerx, and is for type checkers. (The portable engine casts.)"""
    assert "typing" not in _loaded("native")


@pytest.mark.parametrize("name", sorted(ADAPTERS))
def test_adapters_need_no_import_of_their_own(name: str) -> None:
    """`lingerx.trio.aclose` after `import lingerx` alone; without trio the error says what to install."""
    done = _run(f"import lingerx; print(lingerx.{name}.__name__)")
    assert done.stdout == f"lingerx.{name}\n" or f"pip install 'lingerx[{name}]'" in done.stderr, done.stderr


def test_the_import_opens_nothing_and_starts_nothing() -> None:
    code = "import lingerx, threading; assert threading.active_count() == 1; import socket; socket.socket().close()"
    done = _run(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_engine_in_use_is_told() -> None:
    wanted = os.environ.get("LINGERX_ENGINE") or ("native" if NATIVE_IS_HERE else "portable")
    assert lingerx.engine == wanted
    engine = import_module(f"lingerx._{wanted}")
    for name in import_module("lingerx._offers").OFFERS:
        assert getattr(lingerx, name) is getattr(engine, name)


@pytest.mark.parametrize("engine_name", [None, "", "native"], ids=["unset", "empty", "native"])
def test_the_native_engine_where_it_was_built(engine_name: str | None) -> None:
    if not NATIVE_IS_HERE:
        pytest.skip("portable build: lingerx._native is not installed")
    assert _run(SHOW, engine_name).stdout.split() == ["native", "lingerx._native"]


def test_the_portable_engine_on_demand() -> None:
    assert _run(SHOW, "portable").stdout.split() == ["portable", "lingerx._portable"]


def test_the_portable_engine_does_not_need_the_native_one() -> None:
    assert _run(MISSING + SHOW, "portable").stdout.split() == ["portable", "lingerx._portable"]
    assert _run(MISSING + SHOW).stdout.split() == ["portable", "lingerx._portable"]


def test_a_forced_native_engine_that_is_missing() -> None:
    _fails(MISSING + SHOW, "native", "installed without its compiled engine")


@pytest.mark.parametrize("engine_name", [None, "native"])
def test_a_native_engine_that_cannot_be_loaded_is_not_passed_over(engine_name: str | None) -> None:
    _fails(UNUSABLE + SHOW, engine_name, "wrong ELF class")
    _fails(INCOMPLETE + SHOW, engine_name, "no such module")


@pytest.mark.parametrize("engine_name", ["Native", "c", "portable,native", " "])
def test_an_unknown_engine(engine_name: str) -> None:
    _fails(SHOW, engine_name, f"LINGERX_ENGINE is 'native' or 'portable'; got {engine_name!r}")


@pytest.mark.slow
def test_a_user_s_program_in_the_eyes_of_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    program = Path(__file__).with_name("typing_program.py")
    environment = dict(os.environ)
    if PACKAGE.parent.name != "site-packages":  # there mypy looks itself, and finds py.typed
        environment["MYPYPATH"] = str(PACKAGE.parent)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", str(program)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_such_programs_use_every_public_name() -> None:
    """Adapters' names are read from the sources, for not all of their servers are installed here."""
    words = "".join(
        Path(__file__).with_name(f"typing_{name}.py").read_text(encoding="utf-8") for name in ("program", "adapters")
    )
    names = [f"lingerx.{name}" for name in lingerx.__all__]
    names += [f"lingerx.{module}.{name}" for module in ADAPTERS for name in _all_of(PACKAGE / f"{module}.py")]
    assert [name for name in names if not re.search(rf"\b{name}\b", words)] == []


def _all_of(source: Path) -> list[str]:
    (names,) = re.findall(r"^__all__ = (\[[^]]*\])", source.read_text(encoding="utf-8"), re.MULTILINE)
    assert ast.literal_eval(names) == sorted(ast.literal_eval(names))
    return list(ast.literal_eval(names))


def test_every_module_that_users_import_is_known_here() -> None:
    public = {path.stem for path in PACKAGE.glob("*.py") if not path.name.startswith("_")}
    assert public - ADAPTERS == {"closer", "listener", "policy", "report"}


def test_what_a_module_needs_is_told() -> None:
    done = _run(
        "import sys, importlib\n"
        f"for module, package in {EXTRAS}.items():\n"
        "    sys.modules[package] = None\n"
        "    try: importlib.import_module('lingerx.' + module)\n"
        "    except ImportError as error: print(module, '|', error)\n"
    )
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" | ") for line in done.stdout.splitlines())
    assert told.keys() == EXTRAS.keys()
    assert [module for module, error in told.items() if f"pip install 'lingerx[{module}]'" not in error] == []


def test_each_has_an_extra_of_its_own() -> None:
    try:
        provided = metadata("lingerx").get_all("Provides-Extra")
    except PackageNotFoundError:
        pytest.skip("lingerx is not installed: it runs from its sources")
    assert set(EXTRAS) <= set(provided or ())


@pytest.mark.skipif(not NATIVE_IS_HERE, reason="portable build: lingerx._native is not installed")
def test_loop_that_was_made_wrongly_does_no_harm() -> None:
    """Nobody but a Closer makes one; but no Python code may end the process."""
    done = _run("from lingerx._native import Loop\ntry:\n    Loop()\nexcept TypeError:\n    print('refused')", "native")
    assert (done.stdout, done.returncode) == ("refused\n", 0), done.stderr
