"""The fixtures of the servers' tests, and the table of what was seen at the end of the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trustme

pytest.register_assert_rewrite("servers.kit", "servers.running")

from . import links, record  # noqa: E402
from .kit import Certificate  # noqa: E402


@pytest.fixture(scope="session")
def loopback() -> links.Link:
    """This machine's own."""
    return links.Link()


@pytest.fixture(scope="session")
def slow_link() -> Iterator[links.SlowLink]:
    """One for all tests that want it."""
    if why := links.why_no_slow_link():
        pytest.skip(why)
    try:
        with links.slow_link() as link:
            yield link
    except OSError as error:
        pytest.skip(f"no slow link here: {error}")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Certificate:
    """For localhost and 127.0.0.1, and its CA."""
    folder = tmp_path_factory.mktemp("certificate")
    made = Certificate(folder / "chain.pem", folder / "key.pem", folder / "ca.pem")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(made.authority))
    issued = authority.issue_cert("localhost", "127.0.0.1")
    issued.private_key_pem.write_to_path(str(made.key))
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(str(made.chain), append=index > 0)
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    lines = record.table()
    if lines:
        terminalreporter.section("uploads that servers refused")
        for line in lines:
            terminalreporter.write_line(line)
        record.write(lines)
