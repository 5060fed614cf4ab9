"""A throw-away certificate for the lab's server."""

from __future__ import annotations

import datetime as dt
from ipaddress import IPv4Address
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from apagent.lab.plan import SERVER_ADDRESS

_LOOPBACK = IPv4Address("127.0.0.1")
_DAY = dt.timedelta(days=1)


class Certificate(NamedTuple):
    """Two PEM files; the certificate is its own authority."""

    certificate: Path
    key: Path

    @property
    def options(self) -> tuple[str, ...]:
        """For the programs of a server."""
        return ("--certificate", str(self.certificate), "--key", str(self.key))


def make(directory: Path) -> Certificate:
    """Make one for the server's address, and for loopback: the near end of a forwarded port."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server of the lab")])
    addresses = [x509.IPAddress(address) for address in (SERVER_ADDRESS, _LOOPBACK)]
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + _DAY)
        .add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    files = Certificate(directory / "certificate.pem", directory / "key.pem")
    files.certificate.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    files.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return files
