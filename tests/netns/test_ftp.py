"""FTP opens connections of its own for data, and nothing here reads along: helpers are off.

Passive mode works like any two connections. After a roam they may have two anchors, so that the
data connection comes from another address than the control connection: a server that takes only
one, as is usual, refuses it. Active mode gives the server an address that it can't reach.
"""

from __future__ import annotations

import contextlib
import ftplib
import io
import subprocess
import sys
from collections.abc import Iterator

import pytest

from apagent.lab import namespaces
from apagent.lab.lab import Lab
from tests.netns.conftest import MakeLab
from tests.netns.nat_support import forget_flows, listening, roam
from tests.netns.observe import SERVER, address, becomes, sessions

pytestmark = pytest.mark.netns

CONTENT = b"what is in the file " * 5000
TIMEOUT_S = 1.0
STRICT, LENIENT = (SERVER, 21), (SERVER, 2121)
_PROGRAM = """
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler
from pyftpdlib.servers import FTPServer

directory, address, port, lenient = sys.argv[1:]
FTPHandler.authorizer = DummyAuthorizer()
FTPHandler.authorizer.add_anonymous(directory)
FTPHandler.permit_foreign_addresses = FTPHandler.permit_privileged_ports = lenient == "True"
server = FTPServer((address, int(port)), FTPHandler)
print("listening", flush=True)
server.serve_forever()
"""


@pytest.fixture(scope="module")
def domain(module_lab: MakeLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    made = module_lab(aps=2, clients=1)
    directory = tmp_path_factory.mktemp("ftp")
    directory.joinpath("file").write_bytes(CONTENT)
    with contextlib.ExitStack() as stack:
        for (address, port), lenient in ((STRICT, False), (LENIENT, True)):
            arguments = (str(directory), address, str(port), str(lenient))
            stack.enter_context(_ftp_server(made, arguments))
        yield made


@contextlib.contextmanager
def _ftp_server(lab: Lab, arguments: tuple[str, ...]) -> Iterator[None]:
    argv = [sys.executable, "-W", "ignore", "-c", _PROGRAM, *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with lab.popen("server", argv, **pipes) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "listening\n"
            yield
        finally:
            process.terminate()
            process.wait()


@pytest.fixture(autouse=True)
def _at_ap1(domain: Lab) -> None:
    roam(domain, "client1", "ap1")
    forget_flows(domain)


@contextlib.contextmanager
def session(lab: Lab, server: tuple[str, int], *, passive: bool) -> Iterator[ftplib.FTP]:
    ftp = ftplib.FTP(timeout=TIMEOUT_S)  # noqa: S321 - FTP is what this is about
    ftp.set_pasv(passive)
    # The client's sockets are made as they are needed, so this thread stays where they belong.
    with namespaces.inside(lab.namespace("client1")):
        ftp.connect(*server)
        ftp.login()
        try:
            yield ftp
        finally:
            ftp.close()


def file_of(ftp: ftplib.FTP) -> bytes:
    content = io.BytesIO()
    ftp.retrbinary("RETR file", content.write)
    return content.getvalue()


def roam_with_session(lab: Lab) -> None:
    becomes(
        lambda: {s.anchor for s in sessions(lab, "ap2") if s.remote_port in (21, 2121)}, {"ap1"}
    )
    roam(lab, "client1", "ap2")


@pytest.mark.parametrize("server", [STRICT, LENIENT], ids=["strict", "lenient"])
def test_passive_mode_works_without_a_roam(domain: Lab, server: tuple[str, int]) -> None:
    with session(domain, server, passive=True) as ftp:
        assert file_of(ftp) == CONTENT


def test_a_transfer_that_runs_survives_a_roam(domain: Lab) -> None:
    with session(domain, STRICT, passive=True) as ftp:
        ftp.voidcmd("TYPE I")
        with ftp.transfercmd("RETR file") as data:
            received = data.recv(1000)
            roam_with_session(domain)
            while piece := data.recv(1 << 16):
                received += piece
        ftp.voidresp()
        assert received == CONTENT


def test_after_a_roam_a_strict_server_refuses_passive_data(domain: Lab) -> None:
    with session(domain, STRICT, passive=True) as ftp:
        roam_with_session(domain)
        assert ftp.pwd() == "/"
        with pytest.raises(ftplib.error_temp, match="425 Rejected data connection from foreign"):
            file_of(ftp)
    with session(domain, STRICT, passive=True) as ftp:
        assert file_of(ftp) == CONTENT


def test_after_a_roam_a_lenient_server_takes_it_from_the_new_anchor(domain: Lab) -> None:
    with session(domain, LENIENT, passive=True) as ftp:
        roam_with_session(domain)
        assert file_of(ftp) == CONTENT
    becomes(
        lambda: {s.remote_port in (21, 2121): s.anchor for s in sessions(domain, "ap1")},
        {True: "ap1", False: "ap2"},
    )


@pytest.mark.parametrize("ap", ["ap1", "ap2"], ids=["without a roam", "after a roam"])
@pytest.mark.parametrize(
    ("server", "refusal"),
    [(STRICT, "501 Rejected data connection to foreign"), (LENIENT, "425 Can't connect")],
    ids=["strict", "lenient"],
)
def test_active_mode_does_not_pass(
    domain: Lab, ap: str, server: tuple[str, int], refusal: str
) -> None:
    """PORT names the client's own address: refused as foreign, or out of the server's reach."""
    with session(domain, server, passive=False) as ftp:
        if ap != "ap1":
            roam_with_session(domain)
        with (
            listening(domain, "client1", address(domain, "client1")) as data,
            pytest.raises((ftplib.error_temp, ftplib.error_perm), match=refusal),
        ):
            ftp.sendport(*data.getsockname())
