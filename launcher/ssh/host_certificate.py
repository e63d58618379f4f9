"""Whether the certificate of a host holds: signed by an authority of known_hosts, for this host, at this time (OpenSSH, PROTOCOL.certkeys)."""

import base64

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.hazmat.primitives.serialization.ssh import SSHCertificate, SSHCertificateType, load_ssh_public_identity

from launcher.ssh.known_hosts import fingerprint, pattern_match
from launcher.ssh.target import SshTarget


def check_certificate(body: bytes, target: SshTarget, now_s: float) -> str:
    """Why the certificate is refused, with the next step; '' where it holds. `now_s`: seconds since 1970. sshd has proved that it owns the key: the
    signature of the key exchange was verified before."""
    try:
        certificate = read_certificate(body)
        certificate.verify_cert_signature()
    except (ValueError, InvalidSignature, UnsupportedAlgorithm) as error:
        return refusal(target, f"cannot be read: {str(error) or 'its signature is wrong'}")
    signer = certificate.signature_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).split()[1].decode()
    if signer not in [known.body for known in target.known if known.authority]:
        shown = fingerprint(base64.b64decode(signer))
        return refusal(target, f"was signed by {shown}, which is no @cert-authority for this host in {target.known_hosts}")
    if certificate.type != SSHCertificateType.HOST:
        return refusal(target, "is one of a user, not of a host")
    if not certificate.valid_after <= now_s < certificate.valid_before:
        return refusal(target, "is not valid now: its time is over, or a clock is wrong")
    names = [name.decode("utf-8", "replace") for name in certificate.valid_principals]
    if names and not any(pattern_match(name, own) for name in names for own in {target.name, target.host, target.node}):
        return refusal(
            target,
            f"is for {', '.join(names[:4])}, not for {target.name}: write that name as `host` in the cluster file, or as HostKeyAlias",
        )
    return ""


def read_certificate(body: bytes) -> SSHCertificate:
    """Raises ValueError."""
    kind = body[4 : 4 + int.from_bytes(body[:4], "big")]
    found = load_ssh_public_identity(kind + b" " + base64.b64encode(body))
    if not isinstance(found, SSHCertificate):
        raise ValueError("it is a plain key")
    return found


def refusal(target: SshTarget, why: str) -> str:
    return (
        f"{target.title}: the certificate of its host key {why}. No login was tried.\n"
        f"  Next: on the node, ssh-keygen -L -f the file of HostCertificate in its sshd_config shows it"
    )
