"""What check_wheels.py and foreign.py share: how commands are run, wheels built by zig and the tests started.

Nothing here says which wheels there are, or what must hold for them.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection, Mapping
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sys.executable).parent
MACHINE = platform.machine()
ZIG = Path(str(distribution("ziglang").locate_file("ziglang/zig")))
OLDEST_GLIBC = (2, 17)

# Newer compilers refuse these; all must, or a missing header goes unseen.
REFUSED = ("implicit-function-declaration", "incompatible-pointer-types", "int-conversion")
STRICT = [f"-Werror={name}" for name in REFUSED]
RELEASE = ["-O2", "-g0", "-DNDEBUG", "-fwrapv"]
NOT_HERE = ("servers", "test_anyio.py", "test_trio.py")
"""Of the tests: what is about other people's code more than about the Python that runs it."""
SHORT = ("-m", "not slow", "-k", "not portable")

# Debian's pyconfig.h only says where that of each of its machines is, which zig would not find.
COPY_HEADERS = """
import os, shutil, sys, sysconfig
include, into = sysconfig.get_path("include"), sys.argv[1]
shutil.copytree(include, into)
folder, name = os.path.split(include)
settings = os.path.join(folder, sysconfig.get_config_var("MULTIARCH") or "", name, "pyconfig.h")
if os.path.exists(settings):
    shutil.copy(settings, into)
"""

BEGAN = time.monotonic()


def run(*command: object, cwd: Path | None = None, env: Mapping[str, str] | None = None, may_fail: bool = False) -> str:
    """What a command prints. Ends the program when it fails, unless it may."""
    words = [str(word) for word in command]
    environment = clean_environment() | dict(env or {})
    done = subprocess.run(
        words, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    output = done.stdout.decode(errors="replace")
    if done.returncode != 0 and not may_fail:
        raise SystemExit(f"{output}\nexit status {done.returncode}: {' '.join(words)}")
    return output


def clean_environment() -> dict[str, str]:
    """What the caller has set must not choose what is built."""
    mine = ("LINGERX_", "PYTHON", "PYTEST_", "VIRTUAL_ENV", "CC", "CFLAGS", "LDFLAGS", "LDSHARED")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
    kept["PATH"] = f"{TOOLS}{os.pathsep}{kept['PATH']}"
    return kept


def say(step: str, *lines: object) -> None:
    print(f"[{time.monotonic() - BEGAN:4.0f} s] {step}", *lines, sep="\n    ", flush=True)


# --- building ---


def unpack(sdist: Path, into: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(into)
    (tree,) = into.iterdir()
    return tree


def zig_environment(target: str, headers: Path, zig: Path = ZIG) -> dict[str, str]:
    """For a build by setuptools."""
    compiler = f"{zig} cc -target {target}"
    flags = " ".join([*RELEASE, *STRICT, f"-I{headers}"])
    return {"CC": compiler, "LDSHARED": f"{compiler} -shared", "CFLAGS": flags, "LDFLAGS": "-s"}


def repair(wheel: Path, into: Path) -> Path:
    """Named by the oldest glibc it needs, which must be old enough."""
    before = set(into.glob("*.whl"))
    run(TOOLS / "auditwheel", "repair", "--wheel-dir", into, wheel)
    new = sorted(path for path in into.glob("*.whl") if path.name.startswith(wheel.name.rpartition("-")[0]))
    (repaired,) = set(new) - before
    shown = run(TOOLS / "auditwheel", "show", repaired)
    (glibc,) = re.findall(r'following\s+platform\s+tag:\s+"manylinux_(\d+)_(\d+)_', shown)
    assert tuple(map(int, glibc)) <= OLDEST_GLIBC, shown
    return repaired


# --- testing ---


def run_tests(
    python: Path,
    tests: Path,
    elsewhere: Path,
    env: Mapping[str, str] | None = None,
    may_fail: Collection[str] = (),
) -> str:
    """Outside of any tree with sources: the last line that pytest prints. pyproject.toml makes warnings errors.

    may_fail: the names of test functions that cannot pass there. All others must, as ever.
    """
    shutil.copytree(tests, elsewhere, dirs_exist_ok=True)
    # Run in the background, this program is born with SIGINT ignored, and the tests interrupt themselves.
    command = ["env", "--default-signal=INT", python, "-m", "pytest", "-q", *SHORT]
    command += map("--ignore=tests/{}".format, NOT_HERE)
    printed = run(*command, cwd=elsewhere, env=env, may_fail=bool(may_fail)).rstrip()
    summary = printed.rpartition("\n")[2]
    failed = re.findall(r"^(?:FAILED|ERROR) \S+?::(\w+)(?:\[.*?\])?(?: - .*)?$|^(?:FAILED|ERROR) (.*)$", printed, re.M)
    amiss = {name or rest for name, rest in failed} - set(may_fail)
    if amiss or not re.search(r"\d+ passed", summary):
        raise SystemExit(f"{printed}\nfailed, and should not have: {', '.join(sorted(amiss)) or summary}")
    return summary
