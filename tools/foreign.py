"""Tries what check_wheels.py built with Pythons that this machine does not have. Debian, root and a network needed.

- CPython for aarch64, by qemu-user-static: Debian stable's.
- CPython 3.14 and 3.15, in a folder of Debian unstable that is only this run's; there PyPy too, the smoke test alone.

Both folders come by debootstrap.
Not here: what is built and tried for the Pythons of this machine, which check_wheels.py knows.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from building import COPY_HEADERS, ROOT, ZIG, repair, run, run_tests, say, unpack, zig_environment

RELEASES = ("3.14", "3.15")
GLIBCS = (17, 24, 28, 31, 34)
"""Minor versions of those that wheels of others name; pip takes the older ones for granted only by name."""
ARM = "aarch64-linux-gnu"

NOT_UNDER_QEMU = (
    # It hands out four bytes of TCP_INFO. So nobody can tell what a reset has destroyed (`delivered` is None where the
    # tests want False), what was never sent, whether a peer was ever heard of, or count segments.
    "test_abort_at_the_byte_limit",
    "test_abort_at_the_deadline_destroys_exactly_the_unacked",
    "test_connecting_socket_is_not_connected",
    "test_data_for_a_connection_that_was_refused",
    "test_drain_is_not_done_while_a_byte_is_unacked",
    "test_each_probe_alone",
    "test_fin_counts_as_one_unacked_byte",
    "test_fin_rides_on_the_last_data_after_msg_more",
    "test_fin_rides_on_the_last_data_segment",
    "test_flag_that_does_nothing_is_a_note",
    "test_peer_has_reset_and_the_application_has_read_the_error",
    "test_peer_has_reset_before_us",
    "test_peer_never_reads_until_the_limit_and_is_aborted",
    "test_peer_resets_after_its_fin_while_data_is_unacked",
    "test_peer_resets_while_we_wait_for_its_acks",
    "test_refused_and_the_application_has_read_the_error",
    # Its own signals, and its clock.
    "test_thread_blocks_all_signals",
    "test_waiting_costs_no_cpu",
    # OpenSSL of Debian stable on a slow machine: the peer's end of a cut-off session comes later than the tests wait.
    "test_handler_raises_while_we_send",
    "test_peer_that_never_reads",
    "test_somebody_else_closes_while_we_send",
)


def check(sdist: Path, portable: Iterable[Path], tests: Path, work: Path) -> None:
    """All of it."""
    mirror = run("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages").split()[0]
    check_aarch64(sdist, tests, work, mirror)
    check_unstable(sdist, portable, tests, work, mirror)


def install_for(site: Path, version: str, machine: str, *wanted: object, implementation: str = "cp") -> None:
    """Into a folder, for a Python that cannot run pip here."""
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBCS]
    which = ["--only-binary=:all:", f"--implementation={implementation}", f"--python-version={version}", *platforms]
    run(sys.executable, "-m", "pip", "install", "--no-compile", "--target", site, *which, *wanted)


# --- aarch64 ---


def check_aarch64(sdist: Path, tests: Path, work: Path, mirror: str) -> None:
    """The wheel of the Python that runs this, which must be the version that Debian stable has."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    release = run("sed", "-n", "s/^VERSION_CODENAME=//p", "/etc/os-release").strip()
    say(f"{release} for aarch64: CPython {version} under qemu")
    root = work / "aarch64"
    run("debootstrap", "--arch=arm64", "--variant=minbase", "--foreign", "--include=python3", release, root, mirror)
    for package in (root / "var/cache/apt/archives").glob("*.deb"):
        run("dpkg-deb", "--extract", package, root)

    wheel = cross_build(sdist, work, version)
    site = work / "site-aarch64"
    install_for(site, version, "aarch64", f"{wheel}[test]")
    # Nothing tells the kernel to run such programs by qemu: Python must name this script where it starts itself.
    starter = work / "python-aarch64"
    starter.write_text(
        f'#!/bin/sh\nexec qemu-aarch64-static -L {root} {root}/usr/bin/python{version} "$@"\n', encoding="ascii"
    )
    starter.chmod(0o755)
    (site / "sitecustomize.py").write_text(f"import sys\nsys.executable = {str(starter)!r}\n", encoding="ascii")
    elsewhere = work / "elsewhere-aarch64"
    elsewhere.mkdir()
    env = {"PYTHONHOME": "/usr", "PYTHONPATH": str(site), "LINGERX_SANITIZE": "address"}  # the clock runs slower here
    say(wheel.name, run(starter, ROOT / "tools" / "smoke.py", "native", cwd=elsewhere, env=env).strip())
    print("   ", run_tests(starter, tests, elsewhere, env, NOT_UNDER_QEMU), "(TCP_INFO is cut short by qemu)")


def cross_build(sdist: Path, work: Path, version: str) -> Path:
    """By this Python, whose headers say nothing that is not so there."""
    tree = unpack(sdist, work / "tree-aarch64")
    headers = work / "headers-aarch64"
    run(sys.executable, "-c", COPY_HEADERS, headers)
    env = zig_environment(f"{ARM}.2.17", headers) | {
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-{version.replace('.', '')}-{ARM}.so",
    }
    run(sys.executable, "-m", "build", "--wheel", "--outdir", work / "raw-aarch64", tree, env=env)
    (wheel,) = (work / "raw-aarch64").glob("*.whl")
    return repair(wheel, work / "dist")


# --- newer Pythons, and PyPy ---


def check_unstable(sdist: Path, portable: Iterable[Path], tests: Path, work: Path, mirror: str) -> None:
    """CPython with a wheel built by itself, PyPy with the wheel for PyPy."""
    say(f"Debian unstable: CPython {', '.join(RELEASES)} and PyPy")
    root = work / "unstable"
    packages = [f"python{version}-{part}" for version in RELEASES for part in ("venv", "dev")]
    run("debootstrap", "--variant=minbase", f"--include={','.join([*packages, 'pypy3'])}", "sid", root, mirror)
    inside = root / "lingerx"
    inside.mkdir()
    shutil.copytree(tests, inside / "tests")
    shutil.copy2(ROOT / "tools" / "smoke.py", inside)
    shutil.copytree(ZIG.parent, inside / "zig")
    for version in RELEASES:
        wheel = build_inside(root, sdist, work, version)
        install_for(inside / f"site-{version}", version, "x86_64", f"{wheel}[test]")
        say(wheel.name, try_inside(root, version))
    (wheel,) = (path for path in portable if "-pp3." in path.name)
    site, version = inside / "site-pypy", pypy_version(root)
    # Found by a pip that PyPy itself runs: what it takes for its own is neither CPython's guess nor `packaging`'s.
    install_for(site, version, "x86_64", "pip", implementation="pp")
    shutil.copytree(sdist.parent, inside / "dist", dirs_exist_ok=True)
    shutil.copy2(wheel, inside / "dist")
    pip = ["pypy3", "-m", "pip", "install", "--no-index", "--find-links=dist", "--no-deps", "--target=site-pypy"]
    chroot(root, *pip, "--only-binary=:all:", "lingerx", env=["PYTHONPATH=/lingerx/site-pypy"])
    say(wheel.name, smoke(root, "pypy3", "site-pypy", "portable"))


def chroot(root: Path, *command: object, env: Iterable[str] = ()) -> str:
    """In a mount namespace of its own, so that /proc is gone afterwards, whatever happens."""
    script = 'mount -t proc proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
    shared = ["env", "--default-signal=INT", "--chdir=/lingerx", "LANG=C.UTF-8", *env]
    return run("unshare", "--mount", "sh", "-c", script, root, *shared, *command)


def pypy_version(root: Path) -> str:
    return chroot(root, "pypy3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()


def build_inside(root: Path, sdist: Path, work: Path, version: str) -> Path:
    place = root / "lingerx" / f"build-{version}"
    tree = unpack(sdist, place)
    install_for(place / "backend", version, "x86_64", "setuptools", "cython>=3.3,<4")
    interpreter = f"/usr/bin/python{version}"
    inside = Path("/lingerx", place.name)
    chroot(root, interpreter, "-c", COPY_HEADERS, inside / "headers")
    env = zig_environment("x86_64-linux-gnu.2.17", inside / "headers", Path("/lingerx/zig/zig"))
    env |= {
        "PYTHONPATH": str(inside / "backend"),
        "ZIG_GLOBAL_CACHE_DIR": "/tmp/zig",
        "ZIG_LOCAL_CACHE_DIR": "/tmp/zig",
    }
    build = f"import os; os.chdir({tree.name!r}); import setuptools.build_meta as b; b.build_wheel('..')"
    command = [interpreter, "-c", build]
    chroot(root, "env", f"--chdir={place.name}", *command, env=[f"{name}={value}" for name, value in env.items()])
    (wheel,) = place.glob("*.whl")
    return repair(wheel, work / "dist")


def smoke(root: Path, python: str, site: str, engine: str) -> str:
    """What the smoke test says."""
    return chroot(root, python, "-X", "dev", "smoke.py", engine, env=[f"PYTHONPATH=/lingerx/{site}"]).strip()


def try_inside(root: Path, version: str) -> str:
    """The smoke test and the tests; the last line of each."""
    python, site = f"python{version}", f"site-{version}"
    told = smoke(root, python, site, "native")
    command = [python, "-m", "pytest", "-q", "--ignore=tests/servers", "-m", "not slow", "-k", "not portable"]
    tests = chroot(root, "env", "--chdir=tests", *command, env=[f"PYTHONPATH=/lingerx/{site}"])
    return f"{told}\n    {tests.rstrip().rpartition(chr(10))[2]}"
