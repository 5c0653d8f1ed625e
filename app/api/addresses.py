"""Where a request comes from, and who it is charged to.

Two addresses must not be mixed up. The *peer* is who opened the TCP connection; it cannot be forged. The *client
address* is what a trusted proxy says in X-Forwarded-For; run uvicorn with `proxy_headers=False`, or it replaces the
peer before anything here can look at it.
"""

import re
from collections.abc import Callable
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.types import Scope

Address = IPv4Address | IPv6Address
Networks = tuple[IPv4Network | IPv6Network, ...]

# The client of a UNIX socket, and of a server that names no peer.
LOCAL = "local"
# [IPv6]:port, IPv4:port or a bare address; a zone id (fe80::1%eth0) means nothing outside its own machine.
_ADDRESS = re.compile(
    r"\[([0-9a-f:.]+)(?:%[^\]]*)?\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5}|([0-9a-f:.]+)(?:%.*)?", re.IGNORECASE
)
_ADDRESS_CHARS = 64


@lru_cache(maxsize=8192)
def _parse_cached(text: str) -> Address | None:
    match = _ADDRESS.fullmatch(text.strip())
    if match is None:
        return None
    try:
        address = ip_address(match[1] or match[2] or match[3])
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def parse_address(text: str) -> Address | None:
    """The IP address written there, or None. Ports, brackets and zone ids are dropped, v4-mapped is unmapped."""
    return _parse_cached(text) if len(text) <= _ADDRESS_CHARS else None


def client_address(scope: Scope, trusted_networks: Networks) -> str:
    """The address that a request is charged to; `local` for a UNIX socket.

    X-Forwarded-For is believed as far as trusted proxies wrote it: from the right, past every address in
    `trusted_networks`, to the first one outside. An entry that is no address stops the walk, and the last good one
    counts. A peer outside the networks is the client itself, whatever it sends.
    """
    peer = scope.get("client")
    if peer and not trusted_networks:
        return str(peer[0])  # `client_key` reads it
    address = parse_address(peer[0]) if peer else None
    if address is None:
        return LOCAL
    if _is_in(address, trusted_networks):
        forwarded = b",".join(value for name, value in scope["headers"] if name == b"x-forwarded-for")
        for hop in reversed(forwarded.decode("latin-1").split(",")):
            before = parse_address(hop)
            if before is None:
                break
            address = before
            if not _is_in(address, trusted_networks):
                break
    return str(address)


@lru_cache(maxsize=8192)
def client_key(address: str, api_key_name: str | None = None) -> str:
    """The name that limits are charged to: `key:NAME`, `ip:1.2.3.4`, `ip:2001:db8:1:2::/64` or `local`.

    IPv6 counts by /64, which is what one subscriber line has.
    """
    if api_key_name is not None:
        return f"key:{api_key_name}"
    parsed = parse_address(address)
    if parsed is None:
        return LOCAL
    if isinstance(parsed, IPv6Address):
        return f"ip:{IPv6Network((int(parsed) >> 64 << 64, 64))}"
    return f"ip:{parsed}"


def make_counting(trusted_networks: Networks) -> Callable[[str], str | None]:
    """Names who a connection from an address is counted for; None for who speaks for many: a trusted proxy, and this
    machine, where a proxy or a load test may be."""

    @lru_cache(maxsize=8192)
    def name_client(address: str) -> str | None:
        parsed = parse_address(address)
        if parsed is None or parsed.is_loopback or _is_in(parsed, trusted_networks):
            return None
        return client_key(address)

    return name_client


def _is_in(address: Address, networks: Networks) -> bool:
    return any(address in network for network in networks)
