"""Check what the built sdist and wheels hold: python tools/check_dist.py dist/*

A wheel that carries sources of compiled modules, or an sdist that carries generated C, works for a while and then is
built from the wrong file.
"""

import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

SOURCE = Path(__file__).parent.parent / "src"
COMPILED = {"_machine_c", "_native", "report"}
GENERATED = {".o", ".so", ".pyd", ".pyc"}
GENERATED_IN_SOURCE = {".c", ".html"}
IN_SDIST = {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md"}


def sources(*suffixes: str) -> set[str]:
    files = (path for path in SOURCE.joinpath("lingerx").rglob("*") if path.suffix in suffixes)
    return {path.relative_to(SOURCE).as_posix() for path in files}


def sdist_faults(names: set[str]) -> Iterator[str]:
    names = {name.partition("/")[2] for name in names}
    needed = {f"src/{name}" for name in sources(".py", ".pyi", ".pyx", ".pxd", ".pxi", ".h", ".typed")} | IN_SDIST
    yield from (f"lacks {name}" for name in sorted(needed - names))
    for name in sorted(names):
        suffix = PurePosixPath(name).suffix
        if suffix in GENERATED or (suffix in GENERATED_IN_SOURCE and name.startswith("src/")):
            yield f"holds {name}"
    for language in (".c", ".go"):
        if not any(name.startswith("benchmarks/") and name.endswith(language) for name in names):
            yield f"lacks the benchmarks' {language} files"
    if not any(name.startswith("tests/") for name in names):
        yield "lacks tests"


def wheel_faults(names: set[str], *, portable: bool) -> Iterator[str]:
    # auditwheel writes the folders down too.
    names = {name for name in names if ".dist-info/" not in name and not name.endswith("/")}
    modules = {name for name in names if PurePosixPath(name).suffix in {".so", ".pyd"}}
    yield from (f"lacks {name}" for name in sorted(sources(".py", ".pyi", ".typed") - names))
    yield from (f"holds {name}" for name in sorted(names - modules - sources(".py", ".pyi", ".typed")))
    compiled = {PurePosixPath(name).name.partition(".")[0] for name in modules}
    if compiled != (set() if portable else COMPILED):
        yield f"compiled modules are {sorted(compiled)}"


def faults(path: Path) -> Iterator[str]:
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            yield from wheel_faults(set(wheel.namelist()), portable="-none-" in path.name)
    else:
        with tarfile.open(path) as sdist:
            yield from sdist_faults({member.name for member in sdist.getmembers() if member.isfile()})


def main(paths: list[str]) -> int:
    if not paths:
        raise SystemExit(__doc__)
    found = [f"{path}: {fault}" for path in paths for fault in faults(Path(path))]
    print("\n".join(found) or f"{len(paths)} distributions hold what they should")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
