"""Which images a client may name: no local files, no addresses of private networks, nothing too large or too slow."""

import ipaddress
import socket
from dataclasses import dataclass
from threading import BoundedSemaphore
from urllib.parse import urlsplit
from urllib.request import url2pathname

from huggingface_hub.utils import httpx
from PIL import Image

from ..processing_delta_llava import (
    decode_base64,
    decode_data_url,
    fetch_image,
    open_image,
    read_image,
    unreadable_image,
)


# Decoding takes up to 16 bytes for each pixel, so not all threads may decode at once
_DECODING = BoundedSemaphore(4)
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
# Global to Python 3.11, but reserved: protocols (and Oracle's metadata), relays of 6to4, documentation, and the hosts
# that answer only Azure's and Equinix's machines
_RESERVED = [
    ipaddress.ip_network(name)
    for name in ("192.0.0.0/24", "192.88.99.0/24", "3fff::/20", "168.63.129.16/32", "192.80.8.124/32")
]


@dataclass(frozen=True)
class ImageGuard:
    """
    Opens an image that a client of a server names, by [`open_image`], after checking that the client may name it.

    A `data:` URL, base64 and bytes are always accepted, and an http(s) address if it is public: all addresses that its
    name resolves to are checked, also of redirects, and the connection goes to one of them without a second lookup.
    Local paths, `file://`, other schemes and addresses with a password in them are refused.

    Args:
        allow_local_images (`bool`, *optional*, defaults to `False`):
            Whether a client may name files of this machine and addresses that are not public.
        max_bytes (`int`, *optional*, defaults to 32 MiB): The longest file that is accepted.
        max_pixels (`int`, *optional*, defaults to 50 million): The most pixels that it may have.
        timeout (`float`, *optional*, defaults to 20): Seconds for fetching an address, with all redirects.

    Example:

    ```python
    >>> guard = ImageGuard()
    >>> image = guard("https://example.com/cat.png")
    >>> guard("http://localhost/cat.png")
    ValueError: Cannot read image http://localhost/cat.png: localhost is not a public address
    ```"""

    allow_local_images: bool = False
    max_bytes: int = 2**25
    max_pixels: int = 50_000_000
    timeout: float = 20.0

    def __call__(self, source: str | bytes) -> Image.Image:
        """
        Open an image, an http(s) or `data:` URL, base64, or the bytes of a file, as [`open_image`] does: upright, in
        mode RGB.

        Raises:
            ValueError: Names the image, and says why it may not be named or cannot be read.
        """
        return self.check(source)[1]

    def check(self, source: str | bytes) -> tuple[bytes, Image.Image]:
        """As [`ImageGuard`]'s call, but returns the bytes of the file, too."""
        try:
            data = self._read(source)
            if len(data) > self.max_bytes:
                raise ValueError(f"it has more than {self.max_bytes} bytes")
        except Exception as error:  # of httpx, idna and sockets
            raise unreadable_image(source, error) from error
        with _DECODING:
            return data, open_image(data, name=source, max_pixels=self.max_pixels)

    def _read(self, source: str | bytes) -> bytes:
        if isinstance(source, bytes):
            return source
        if not isinstance(source, str):
            raise TypeError(f"its type is {type(source).__name__}: give a URL, base64 or bytes")
        scheme = source[:8].partition(":")[0].lower()
        if scheme in ("http", "https"):
            transport = None if self.allow_local_images else _PublicTransport()
            return fetch_image(source, timeout=self.timeout, max_bytes=self.max_bytes, transport=transport)
        if scheme == "data":
            return decode_data_url(source)
        if self.allow_local_images:
            return read_image(url2pathname(urlsplit(source).path) if scheme == "file" else source)
        try:
            return decode_base64(source)
        except ValueError:
            raise PermissionError(
                "it is neither a public http(s) address nor a data: URL nor base64, and local files are not allowed"
            ) from None


class _PublicTransport(httpx.BaseTransport):
    """Sends a request only to a public address that it has looked up and checked itself."""

    def __init__(self):
        # A connection for one name must not serve another name of the same address
        limits = httpx.Limits(max_keepalive_connections=0)
        self._transport = httpx.HTTPTransport(limits=limits)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        if url.userinfo:
            raise PermissionError(f"{url.host} is named with a user or password, which is not allowed")
        for address in (addresses := public_addresses(url.host, url.port)):
            # The Host header already has the name; the certificate must be the name's, too
            to_address = httpx.Request(
                request.method,
                url.copy_with(host=address),
                headers=request.headers,
                stream=request.stream,
                extensions={**request.extensions, "sni_hostname": url.host},
            )
            try:
                return self._transport.handle_request(to_address)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                if address == addresses[-1]:
                    raise

    def close(self):
        self._transport.close()


def public_addresses(host: str, port: int | None = None) -> list[str]:
    """
    Look up the IP addresses of a host, and refuse it if one of them is not public.

    Args:
        host (`str`): A name, or an address in any spelling that the system accepts (`127.1`, `0x7f000001`).
        port (`int`, *optional*): Port of the connection.

    Returns:
        `list[str]`: The addresses, in the system's order.

    Raises:
        PermissionError: For an address that is loopback, private, link-local, shared (CGNAT), multicast or reserved, or
            an IPv6 address that embeds such an IPv4 one.
        OSError: If the name is unknown.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = list(dict.fromkeys(address for *_, (address, *_) in found))
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address)):
            # The address itself would reveal a private network
            raise PermissionError(f"{host} is not a public address")
    return addresses


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    is_reserved_here = any(address in network for network in _RESERVED)
    return address.is_global and not (address.is_multicast or address.is_reserved or is_reserved_here)
