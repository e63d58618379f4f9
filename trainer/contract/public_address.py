"""Which IP addresses belong to the public internet. Any other could be a service of this machine, its network or its cloud provider."""

import ipaddress
from collections.abc import Iterable

GLOBAL_V6 = ipaddress.ip_network("2000::/3")  # IANA, IPv6 global unicast
# In addition to what `is_global` refuses: its table differs between versions of Python, and some versions take some of these for global.
NOT_PUBLIC = tuple(
    map(
        ipaddress.ip_network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24"),
            *("192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            "168.63.129.16/32",  # Azure's WireServer: a public address that reaches the host of a virtual machine
            "2001::/23",  # special purposes, including Teredo, which embeds an IPv4 address
            "2001:db8::/32",  # documentation
            "2002::/16",  # 6to4, which embeds an IPv4 address
            "3fff::/20",  # documentation
        ),
    )
)


def is_public(text: str) -> bool:
    """Whether `text` is an address of the public internet. Addresses that embed an IPv4 address (mapped, NAT64, 6to4, Teredo) are not:
    which host they reach depends on the network."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6 and (address not in GLOBAL_V6 or getattr(address, "scope_id", None)):
        return False
    refused = address.is_multicast or address.is_private or address.is_reserved or address.is_unspecified or not address.is_global
    return not refused and not any(address in network for network in NOT_PUBLIC if network.version == address.version)


def choose(addresses: Iterable[str]) -> str | None:
    """The first address; None when there is none, or when any of them is not public: such a name may resolve to a private one next time."""
    found = list(dict.fromkeys(addresses))
    return found[0] if found and all(map(is_public, found)) else None
