"""http_closer.py in a machine whose clock counts instructions, user and kernel: exact where no counter can be had.

    python benchmarks/counted.py [--rounds 5]

Virtual machines seldom let perf count. But qemu emulates a machine whose clock goes on by one nanosecond with each
instruction (-icount shift=0): its CPU time in us is thousands of instructions, however busy the real one is. It has one
core, for server and client, the kernel of Debian's cloud images, and this lingerx. About twelve minutes.

Needs root, Debian, and its Python 3 to be of this Python's version; apt-get install qemu-system-x86 debootstrap cpio.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import lingerx

HERE = Path(__file__).parent
LONGEST = 3600  # seconds
MEMORY = 3000  # MiB, of which the files take a tenth

INIT = """#!/bin/sh
export PATH=/usr/bin:/bin:/usr/sbin:/sbin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
ip link set lo up
ulimit -n 65536
echo BEGIN
cd /benchmarks && python3 http_closer.py --counter emulated --seconds 1 --rounds {rounds} 2>&1
echo END
poweroff -f
"""


def run(*command: object, cwd: Path | None = None) -> str:
    """What a command prints; ends the program when it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"counted: {command[0]} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def make_root(root: Path, rounds: int) -> None:
    """A small Debian with this lingerx and these benchmarks."""
    mirror = run("apt-get", "indextargets", "--format", "$(SITE)", "Created-By: Packages").split()[0]
    release = run("sed", "-n", "s/^VERSION_CODENAME=//p", "/etc/os-release").strip()
    packages = "python3,wrk,gcc,libc6-dev,iproute2"
    run("debootstrap", "--variant=minbase", f"--include={packages}", release, root, mirror)
    for folder in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/locale", "usr/share/man"):
        shutil.rmtree(root / folder)
    name = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    if not (root / "usr/bin" / name).exists():
        sys.exit(f"counted: Debian {release} has another Python than this, which is {name}")
    package = Path(lingerx.__file__).parent
    shutil.copytree(package, root / "usr/lib/python3/dist-packages/lingerx")
    shutil.copytree(HERE, root / "benchmarks")
    (root / "init").write_text(INIT.format(rounds=rounds), encoding="ascii")
    (root / "init").chmod(0o755)


def fetch_kernel(work: Path) -> Path:
    """The newest of Debian's cloud kernels."""
    (named,) = run("apt-cache", "depends", "--no-recommends", "--no-suggests", "linux-image-cloud-amd64").split()[-1:]
    run("apt-get", "download", named, cwd=work)
    (package,) = work.glob("linux-image*.deb")
    run("dpkg-deb", "--extract", package, work / "kernel")
    (kernel,) = (work / "kernel" / "boot").glob("vmlinuz*")
    return kernel


def main() -> None:
    """Build the machine, run it, and print what the benchmark printed in it."""
    parser = argparse.ArgumentParser(description="http_closer.py, counted in instructions by an emulated machine.")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="lingerx-counted-") as name:
        work = Path(name)
        make_root(work / "root", rounds)
        kernel = fetch_kernel(work)
        files = work / "files.cpio"
        run("sh", "-c", f"find . -print0 | cpio --null --create --format=newc --quiet >{files}", cwd=work / "root")
        machine = ["-m", str(MEMORY), "-smp", "1", "-cpu", "max", "-icount", "shift=0,sleep=off"]
        machine += ["-nographic", "-no-reboot", "-kernel", str(kernel), "-initrd", str(files)]
        settings = "console=ttyS0 rdinit=/init tsc=reliable clocksource=tsc quiet panic=-1"
        printed = run("timeout", LONGEST, "qemu-system-x86_64", *machine, "-append", settings)
    print(printed.partition("BEGIN")[2].partition("END")[0].strip())


if __name__ == "__main__":
    main()
