"""Build the sdist and the wheels as a release does, without a container, and try each where it was not built.

pip install '.[wheels]' && python tools/check_wheels.py           # about four minutes on two cores
python tools/check_wheels.py --long                               # machines that are not this one, too: see foreign.py

From the sdist comes a wheel for every CPython here, compiled by zig against glibc 2.17, and the portable wheels. What
they hold and need is checked; then each is installed where no compiler can be found, and must work. The C is also
compiled for the platforms that nobody here can run.

Release wheels are built by cibuildwheel (.github/workflows/wheels.yml): this program finds out early what it would.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from building import (
    COPY_HEADERS,
    MACHINE,
    OLDEST_GLIBC,
    RELEASE,
    ROOT,
    STRICT,
    TOOLS,
    ZIG,
    repair,
    run,
    run_tests,
    say,
    unpack,
    zig_environment,
)
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

TARGETS = (
    *("x86_64-linux-gnu.2.17", "aarch64-linux-gnu.2.17", "x86_64-linux-musl", "aarch64-linux-musl"),
    *("x86_64-macos", "aarch64-macos", "riscv64-linux-gnu", "powerpc64le-linux-gnu", "s390x-linux-gnu"),
    "x86_64-freebsd",
)

PORTABLE_TAGS = (["--python-tag", "pp3.pp310.pp311.pp312"], ["--platform-tag", "win32.win_amd64.win_arm64"])
"""Of the portable wheels; pyproject.toml says why there is none for any platform.

pip on PyPy takes pp311-none-any where `packaging` says pp3-none-any. (uv takes neither, and builds the sdist.)
"""


SLOW_IMPORT = 25.0
"""Milliseconds beyond `import socket`. 20 are promised, and half of that is normal; but the machine may be busy."""


WHAT_IT_IS = """
import os, sys, sysconfig
version = sys.version_info
assert sys.implementation.name == "cpython" and version >= (3, 10)
open(os.path.join(sysconfig.get_path("include"), "Python.h")).close()
threads = "t" if sysconfig.get_config_var("Py_GIL_DISABLED") else ""
print(f"{version[0]}.{version[1]}{threads} {version[2]:03} {sys.executable}")
"""


class Python(NamedTuple):
    """An interpreter: "3.10" or "3.14t", and where it is."""

    name: str
    path: Path


SDIST = Python("sdist", Path(sys.executable))
"""The one that builds the sdist where it is tried."""


# --- building ---


def find_pythons() -> Iterator[Python]:
    """Every CPython since 3.10 of pyenv and of the PATH that has its headers; the newest of each minor version."""
    candidates = [str(path) for path in Path.home().glob(".pyenv/versions/3.*/bin/python")]
    candidates += [f"python3.{minor}{threads}" for minor in range(10, 20) for threads in ("", "t")]
    found: dict[str, tuple[str, str]] = {}
    for candidate in [*candidates, sys.executable]:
        if not shutil.which(candidate):
            continue
        asked = subprocess.run([candidate, "-c", WHAT_IT_IS], capture_output=True, text=True)
        if asked.returncode == 0:
            name, patch, path = asked.stdout.split(maxsplit=2)
            found[name] = max(found.get(name, ("", "")), (patch, path.strip()))
    for name in sorted(found, key=lambda name: (int(name.strip("t").partition(".")[2]), name)):
        if name != "3.13t":  # an experiment that Cython and cibuildwheel support no more
            yield Python(name, Path(found[name][1]))


def export(into: Path) -> Path:
    """The files git knows or would add; where there is no git, all that was not built."""
    into.mkdir()
    if (ROOT / ".git").exists():
        listed = run("git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard", cwd=ROOT)
        names = [name for name in listed.split("\0") if name and (ROOT / name).exists()]
        for name in names:
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, into / name)
    else:
        unwanted = shutil.ignore_patterns("build", "dist", "*.so", "*.egg-info", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, into, dirs_exist_ok=True, ignore=unwanted)
    return into


def build_sdist(source: Path, into: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--outdir", into, source)
    (sdist,) = into.glob("*.tar.gz")
    return sdist


def build_wheel(python: Python, sdist: Path, work: Path) -> Path:
    """A manylinux wheel. Always from a tree of its own: what another Python left there would go into the wheel."""
    tree = unpack(sdist, work / f"tree-{python.name}")
    pip = new_environment(python, work / f"build-{python.name}") / "pip"
    raw = work / f"raw-{python.name}"
    target = f"{MACHINE}-linux-gnu.{'.'.join(map(str, OLDEST_GLIBC))}"
    headers = work / f"headers-{python.name}"
    run(python.path, "-c", COPY_HEADERS, headers)
    env = zig_environment(target, headers)
    run(pip, "wheel", "--no-deps", "--wheel-dir", raw, tree, env=env)
    (wheel,) = raw.glob("*.whl")
    return repair(wheel, work / "dist")


def build_portable(sdist: Path, work: Path) -> list[Path]:
    """One for PyPy, one for Windows, and none that pip on a Linux without a fitting wheel would take."""
    raw = work / "raw-portable"
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", raw, sdist, env={"LINGERX_BUILD": "portable"})
    (wheel,) = raw.glob("*-py3-none-any.whl")
    for tags in PORTABLE_TAGS:
        run(sys.executable, "-m", "wheel", "tags", *tags, wheel)
    wheel.unlink()
    made = [Path(shutil.copy2(path, work / "dist")) for path in raw.glob("*.whl")]
    here = set(sys_tags())
    assert not [path for path in made if parse_wheel_filename(path.name)[3] & here], "pip would take it here"
    return made


# --- what the files hold ---


def check_contents(source: Path, sdist: Path, wheels: Iterable[Path]) -> None:
    files = [sdist, *wheels]
    run(TOOLS / "twine", "check", "--strict", *files)
    run(sys.executable, source / "tools" / "check_dist.py", *files)
    run(TOOLS / "check-wheel-contents", *wheels)
    run(TOOLS / "pydistcheck", *files)


# --- where they must work ---


def new_environment(python: Python, place: Path) -> Path:
    """The folder of programs of a fresh virtual environment."""
    run(python.path, "-m", "venv", place)
    return place / "bin"


def without_compiler(programs: Path) -> dict[str, str]:
    """Nothing but the environment's own programs can be found."""
    return {"PATH": str(programs)}


def try_installed(programs: Path, elsewhere: Path, engine: str) -> str:
    """The smoke test, whose last line this is, and the commands."""
    env = without_compiler(programs)
    command = [programs / "python", "-X", "dev", "-W", "error", ROOT / "tools" / "smoke.py", engine]
    told = run(*command, cwd=elsewhere, env=env).strip()
    run(programs / "lingerx", "--version", cwd=elsewhere, env=env)
    run(programs / "lingerx", "doctor", cwd=elsewhere, env=env)
    run(programs / "lingerx", "demo", "--uploads", "2", cwd=elsewhere, env=env)
    return told


def import_time(programs: Path) -> float:
    """Milliseconds that `import lingerx` takes after `import socket`.

    The sum, over the modules that it loads, of the best of their times in seven runs: noise only adds.
    """
    best: dict[str, int] = {}
    for _ in range(7):
        shown = run(programs / "python", "-X", "importtime", "-c", "import socket, lingerx")
        _, _, ours = shown.partition("| socket\n")
        for took, module in re.findall(r"import time: +(\d+) \| +\d+ \| +(\S+)", ours):
            best[module] = min(best.get(module, int(took)), int(took))
    assert "lingerx" in best, shown
    whole = sum(best.values()) / 1000
    assert whole < SLOW_IMPORT, best
    return whole


def check_wheel(python: Python, wheel: Path, work: Path) -> str:
    """In a fresh environment without a compiler."""
    programs = new_environment(python, work / f"try-{python.name}")
    elsewhere = work / f"elsewhere-{python.name}"
    elsewhere.mkdir()
    env = without_compiler(programs)
    run(programs / "pip", "install", "--only-binary", ":all:", f"{wheel}[cli]", cwd=elsewhere, env=env)
    return f"{wheel.name}: {try_installed(programs, elsewhere, 'native')}"


def test_wheel(python: Python, work: Path, tests: Path) -> str:
    """The last line that pytest prints, outside of any tree with sources."""
    programs = work / f"try-{python.name}" / "bin"
    elsewhere = work / f"elsewhere-{python.name}"
    run(programs / "pip", "install", "--find-links", work / "dist", "lingerx[test]", cwd=elsewhere)
    return run_tests(programs / "python", tests, elsewhere)


def tests_of(sdist: Path, work: Path) -> Path:
    """What the sdist carries, without the sources of the package."""
    tree = unpack(sdist, work / "sdist-tests")
    shutil.rmtree(tree / "src")
    (tree / "setup.py").unlink()
    return tree.rename(work / "tests")


def check_sdist(sdist: Path, work: Path) -> str:
    """In a fresh environment and an empty folder, by this machine's compiler."""
    programs = new_environment(SDIST, work / "try-sdist")
    elsewhere = work / "elsewhere-sdist"
    elsewhere.mkdir()
    run(programs / "pip", "install", "--no-cache-dir", f"{sdist}[cli]", cwd=elsewhere)
    return f"{sdist.name}: {try_installed(programs, elsewhere, 'native')}"


# --- other platforms ---


def compile_for(target: str, built: Path, headers: Path, work: Path, *, link: bool) -> str:
    """All modules, by the headers of a Python of this machine: others' pyconfig.h differ in little. Not run."""
    began = time.monotonic()
    # To compile without optimizing takes a fifth of the time, and nobody runs the result. (UBSan is zig's habit then.)
    how = [*RELEASE, "-shared"] if link else ["-O0", "-g0", "-fno-sanitize=undefined", "-c"]
    if link and target.endswith("macos"):
        how += ["-undefined", "dynamic_lookup"]
    for source in sorted((built / "build" / "cython").rglob("*.c")):
        made = work / f"{target}-{source.stem}.{'so' if link else 'o'}"
        included = [f"-I{headers}", f"-I{built / 'src' / 'lingerx'}"]
        run(ZIG, "cc", "-target", target, "-fPIC", *how, *STRICT, *included, source, "-o", made)
    return f"{target}: {time.monotonic() - began:.0f} s"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--long", action="store_true", help="link for every target, and run foreign.py")
    arguments.add_argument("--keep", type=Path, metavar="FOLDER", help="work here, and leave everything behind")
    options = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.keep or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        # Of its own: nothing that an earlier run made is used.
        os.environ["ZIG_GLOBAL_CACHE_DIR"] = os.environ["ZIG_LOCAL_CACHE_DIR"] = str(work / "zig")
        check(work, long=options.long)


def check(work: Path, *, long: bool) -> None:
    pythons = list(find_pythons())
    say("sdist, from a clean export")
    (work / "dist").mkdir()
    source = export(work / "export")
    sdist = build_sdist(source, work / "dist")
    tests = tests_of(sdist, work)

    say("wheels, from the sdist: " + ", ".join(python.name for python in pythons), "and those for PyPy and Windows")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        portable_made = pool.submit(build_portable, sdist, work)
        wheels = list(pool.map(lambda python: build_wheel(python, sdist, work), pythons))
        portable = portable_made.result()
        # Compilers work and programs wait: side by side they take no longer than either.
        (built,) = (work / f"tree-{pythons[-1].name}").iterdir()
        headers = work / f"headers-{pythons[-1].name}"
        tried = [pool.submit(check_sdist, sdist, work)]
        compiled = [pool.submit(compile_for, target, built, headers, work, link=long) for target in TARGETS]
        tried += [pool.submit(check_wheel, *each, work) for each in zip(pythons, wheels, strict=True)]
        check_contents(source, sdist, [*wheels, *portable])
        say("they hold what they should", *(path.name for path in [*wheels, *portable]))
        say(f"compiled {'and linked ' if long else ''}for", *(future.result() for future in compiled))
        say("fresh environments, for the wheels without a compiler", *(future.result() for future in tried))
    took = (f"{python.name}: {import_time(work / f'try-{python.name}' / 'bin'):.1f}" for python in pythons)
    say("import lingerx, ms beyond import socket", *took)

    # In between stands the Python that runs all tests anyway.
    tested = [*pythons, SDIST] if long else list(dict.fromkeys([pythons[0], pythons[-1]]))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = pool.map(lambda python: f"{python.name}: {test_wheel(python, work, tests)}", tested)
        say("the tests, on what was installed", *passed)
    if long:
        import foreign

        foreign.check(sdist, portable, tests, work)
    say("all is well")


if __name__ == "__main__":
    main()
