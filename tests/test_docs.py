"""The documentation names what there is, and what it names is there. Read from the files; Sphinx is not needed."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lingerx

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"

if not DOCS.is_dir():
    pytest.skip("the documentation is not here: the tests of a wheel run without it", allow_module_level=True)

PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))

IN_LINGERX_ITSELF = {"closer", "listener", "policy", "report"}
"""What they offer is imported from `lingerx`."""
MODULES = sorted(
    path.stem
    for path in Path(lingerx.__file__).parent.glob("*.py")
    if not path.stem.startswith("_") and path.stem not in IN_LINGERX_ITSELF
)
NO_SERVERS = {"prometheus"}

FENCE = re.compile(r"^(```+)(.*?)\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Overrides the one for all: nothing is opened here, and looking for it would take longer than the tests."""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """All but fenced code, where brackets mean something else, and "#" is no heading."""
    return FENCE.sub("", text_of(page))


def links_of(page: Path) -> set[str]:
    return {link for link in LINK.findall(prose_of(page)) if "://" not in link}


def anchors_of(page: Path) -> set[str]:
    """As GitHub and MyST make them of headings."""
    headings = [heading.lower().replace(" ", "-") for heading in HEADING.findall(prose_of(page))]
    return {re.sub(r"[^\w-]", "", heading) for heading in headings}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_is_in_the_reference_and_every_adapter_among_the_servers(module: str) -> None:
    assert f".. automodule:: lingerx.{module}\n" in text_of(DOCS / "reference.md")
    if module not in NO_SERVERS:
        assert f"lingerx.{module}" in text_of(DOCS / "servers.md")


def test_every_public_name_is_in_the_reference() -> None:
    reference = text_of(DOCS / "reference.md")
    missing = [name for name in lingerx.__all__ if not re.search(rf"(auto\w+:: |`lingerx\.){name}\b", reference)]
    assert missing == []


def test_every_example_is_linked() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links_of(page)}
    examples = sorted((ROOT / "examples").glob("*.py"))
    assert examples
    assert [path.name for path in examples if path.resolve() not in linked] == []


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


@each_page
def test_python_in_the_text_compiles(page: Path) -> None:
    for _, language, code in FENCE.findall(text_of(page)):
        if language.strip() == "python":
            compile(code, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def test_every_page_is_reached_from_the_first() -> None:
    [tree] = [code for _, language, code in FENCE.findall(text_of(DOCS / "index.md")) if language == "{toctree}"]
    pages = {page.relative_to(DOCS).with_suffix("").as_posix() for page in DOCS.rglob("*.md")}
    assert pages - {"index"} == set(tree.split()) - {":hidden:"}
