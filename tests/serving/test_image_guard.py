"""The network policy: what a client may name as an image, and that nothing gets around it."""

import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from clients import encoded
from huggingface_hub.utils import httpx
from PIL import Image

from delta_llava.processing_delta_llava import open_image
from delta_llava.serving import image_guard
from delta_llava.serving.image_guard import ImageGuard


@pytest.fixture(scope="module")
def picture(noise):
    return encoded(noise(1)[0])


@pytest.fixture
def internet(http_server, picture, monkeypatch):
    """
    Names that resolve to servers on loopback: `public.test`, whose address counts as public here, and `private.test`.

    `internet.lookups` are the names that were looked up, `internet.requests` what reached a server.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.client_address, self.headers["Host"], self.path))
            path, _, argument = self.path.partition("?")
            if path == "/redirect":
                self.send_response(302)
                self.send_header("Location", argument)
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            step = 1 if path == "/slow" else len(picture)
            for start in range(0, len(picture), step):
                self.wfile.write(picture[start : start + step])
                time.sleep(0.05)

        def log_message(self, *args):
            pass

    server = http_server(Handler)
    server.requests, server.lookups = [], []
    server.names = {"public.test": ["127.0.0.1"], "private.test": ["127.0.0.2"], "both.test": ["127.0.0.1", "10.0.0.1"]}
    resolve, is_public = socket.getaddrinfo, image_guard._is_public

    def getaddrinfo(host, port, *args, **kwargs):
        name = host.decode() if isinstance(host, bytes) else host
        if name.endswith(".test"):
            server.lookups.append(name)
            found = server.names[name]
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port or 80)) for address in found]
        return resolve(host, port, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(image_guard, "_is_public", lambda address: str(address) == "127.0.0.1" or is_public(address))
    return server


def test_what_is_sent_along_is_opened_like_everywhere_else(picture):
    guard, expected = ImageGuard(), open_image(picture).tobytes()
    data = base64.b64encode(picture).decode()
    for source in (picture, data, f"data:image/png;base64,{data}", f"DATA:;base64,{data}"):
        assert guard(source).tobytes() == expected


def test_a_public_address_is_looked_up_once_and_connected_to_by_its_address(internet, picture):
    port = internet.server_port
    assert ImageGuard()(f"http://public.test:{port}/image.png").tobytes() == open_image(picture).tobytes()
    assert internet.lookups == ["public.test"]
    assert [host for _, host, _ in internet.requests] == [f"public.test:{port}"]
    # Another address at a second look-up would not matter
    assert ImageGuard()(f"http://public.test:{port}/redirect?/image.png").size == open_image(picture).size


def test_the_certificate_is_still_that_of_the_name(monkeypatch):
    sent = []

    class Transport(httpx.BaseTransport):
        def __init__(self, **kwargs):
            pass

        def handle_request(self, request):
            sent.append(request)
            raise httpx.ConnectError("unreachable")

    monkeypatch.setattr(httpx, "HTTPTransport", Transport)
    monkeypatch.setattr(image_guard, "public_addresses", lambda host, port: ["2606:4700::1", "93.184.215.14"])
    with pytest.raises(ValueError, match=r"Cannot read image https://example\.com/a\.png: unreachable"):
        ImageGuard()("https://example.com/a.png")
    assert [request.url.host for request in sent] == ["2606:4700::1", "93.184.215.14"]
    assert {request.extensions["sni_hostname"] for request in sent} == {"example.com"}
    assert {request.headers["Host"] for request in sent} == {"example.com"}


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "127.0.0.1",
        "127.1",
        "0x7f000001",
        "2130706433",
        "0177.1",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.0.1",
        "100.64.0.1",
        "169.254.169.254",
        "168.63.129.16",
        "192.0.0.192",
        "192.80.8.124",
        "198.18.0.1",
        "192.88.99.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "127。0。0。1",
        "[::]",
        "[::1]",
        "[::127.0.0.1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:0:7f00:1]",
        "[64:ff9b::168.63.129.16]",
        "[64:ff9b:1::7f00:1]",
        "[2002:7f00:1::]",
        "[2001:0:1::1]",
        "[fc00::1]",
        "[fe80::1]",
        "[fec0::1]",
        "[ff0e::1]",
        "[2001:db8::1]",
        "[3fff::1]",
        "[4000::1]",
    ],
)
def test_addresses_that_are_not_public_are_refused(host, monkeypatch):
    monkeypatch.setattr(httpx, "HTTPTransport", lambda **kwargs: httpx.MockTransport(lambda request: 1 / 0))
    for scheme in ("http", "https"):
        with pytest.raises(ValueError, match="is not a public address"):
            ImageGuard()(f"{scheme}://{host}/image.png")


@pytest.mark.parametrize("address", ["8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::", "2606:4700::1"])
def test_public_addresses_are_not(address):
    assert image_guard.public_addresses(address) == [address]


def test_a_name_with_one_address_that_is_not_public_is_refused(internet):
    for name in ("private.test", "both.test"):
        with pytest.raises(ValueError, match=f"{name} is not a public address"):
            ImageGuard()(f"http://{name}:{internet.server_port}/image.png")
    assert not internet.requests


def test_redirects_are_checked_like_addresses(internet):
    port = internet.server_port
    for target in (
        f"http://private.test:{port}/image.png",
        f"http://127.0.0.2:{port}/image.png",
        f"http://[::1]:{port}/image.png",
        f"//private.test:{port}/image.png",
        f"/redirect?http://private.test:{port}/image.png",
    ):
        with pytest.raises(ValueError, match="is not a public address"):
            ImageGuard()(f"http://public.test:{port}/redirect?{target}")
    for target in ("file:///etc/hostname", "ftp://public.test/image.png", "data:,x"):
        with pytest.raises(ValueError, match="Cannot read image"):
            ImageGuard()(f"http://public.test:{port}/redirect?{target}")
    with pytest.raises(ValueError, match="with a user or password"):
        ImageGuard()(f"http://public.test:{port}/redirect?http://me:secret@public.test:{port}/image.png")
    with pytest.raises(ValueError, match="redirects"):
        ImageGuard()(f"http://public.test:{port}/redirect?/redirect?/redirect?/redirect?/redirect?/redirect?/image.png")
    assert all(path.startswith("/redirect") for _, _, path in internet.requests)


def test_proxies_of_the_environment_change_nothing(internet, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert ImageGuard()(f"http://public.test:{internet.server_port}/image.png").mode == "RGB"
    with pytest.raises(ValueError, match="is not a public address"):
        ImageGuard()(f"http://private.test:{internet.server_port}/image.png")


def test_local_files_and_other_schemes_are_refused(picture, tmp_path, monkeypatch):
    path = tmp_path / "image.png"
    path.write_bytes(picture)
    monkeypatch.chdir(tmp_path)
    for source in (
        str(path),
        "image.png",
        path.as_uri(),
        f"FILE:{path}",
        f"file:{path}",
        "ftp://a/b",
        "",
        " /etc",
        "\0",
    ):
        with pytest.raises(ValueError, match="local files are not allowed"):
            ImageGuard()(source)
    with pytest.raises(ValueError, match="with a user or password"):
        ImageGuard()("http://me:secret@8.8.8.8/image.png")
    for source in (path, None, 5, ["a"], {"url": "a"}):
        with pytest.raises(ValueError, match="its type is"):
            ImageGuard()(source)


def test_the_owner_of_a_server_may_allow_local_images(picture, tmp_path, httpserver_url):
    path = tmp_path / "an image.png"
    path.write_bytes(picture)
    guard, expected = ImageGuard(allow_local_images=True), open_image(picture).tobytes()
    for source in (str(path), path.as_uri(), f"{httpserver_url(tmp_path)}/an%20image.png", picture):
        assert guard(source).tobytes() == expected
    with pytest.raises(ValueError, match="no such file"):
        guard(str(tmp_path / "missing.png"))


def test_an_answer_has_limits(internet, picture):
    url = f"http://public.test:{internet.server_port}"
    with pytest.raises(ValueError, match=r"/slow: no whole answer within 0\.5 s"):
        ImageGuard(timeout=0.5)(f"{url}/slow")
    for source in (f"{url}/image.png", picture):
        with pytest.raises(ValueError, match=r"it has more than 100 bytes"):
            ImageGuard(max_bytes=100)(source)


def test_nothing_goes_on_after_the_time_out(internet, monkeypatch):
    url, resolve = f"http://public.test:{internet.server_port}", socket.getaddrinfo

    def slow(host, *args, **kwargs):
        time.sleep(0.4 if "public.test" in str(host) else 0)
        return resolve(host, *args, **kwargs)

    before = set(threading.enumerate())
    for path, timeout in (("/slow", 0.6), ("/redirect?/slow", 0.6), ("/slow", 0.3)):
        with pytest.raises(ValueError, match=rf"no whole answer within {timeout} s"):
            ImageGuard(timeout=timeout)(url + path)
        monkeypatch.setattr(socket, "getaddrinfo", slow)
    ended = time.monotonic() + 1
    while left := [one for one in threading.enumerate() if one not in before and "ThreadPool" in one.name]:
        assert time.monotonic() < ended, left
        time.sleep(0.02)
    # What was still looked up when the time was over was not asked
    assert [path for _, _, path in internet.requests] == ["/slow", "/redirect?/slow"]


def test_a_file_that_unpacks_to_too_many_pixels_is_refused_before_it_does():
    bomb = encoded(Image.new("L", (8000, 8000)))
    assert len(bomb) < 100_000
    for source in (bomb, "data:;base64," + base64.b64encode(bomb).decode()):
        with pytest.raises(ValueError, match="it has 8000 x 8000 pixels, more than 50000000 in all"):
            ImageGuard()(source)
    with pytest.raises(ValueError, match="more than 100 in all"):
        ImageGuard(max_pixels=100)(encoded(Image.fromarray(np.zeros((20, 20), np.uint8))))
