"""What is measured: for each scenario the application, the load and its unit."""

from __future__ import annotations

from dataclasses import dataclass

# What a browser sends beside Host when it follows a link.
BROWSER = (
    "Connection: keep-alive",
    "Cache-Control: max-age=0",
    'sec-ch-ua: "Chromium";v="126", "Not/A)Brand";v="8"',
    "sec-ch-ua-mobile: ?0",
    'sec-ch-ua-platform: "Linux"',
    "Upgrade-Insecure-Requests: 1",
    "User-Agent: Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/126.0.0.0 Safari/537.36",
    "Accept: text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8",
    "Sec-Fetch-Site: none",
    "Accept-Encoding: gzip, deflate, br, zstd",
    "Accept-Language: en-GB,en;q=0.9,de;q=0.8",
    "Cookie: session=4f1d2c7a9b8e4d53; theme=dark",
)
CLOSING = ("Connection: close", *BROWSER[1:])

LOGGED = ("prefork native", "prefork native, access log", "prefork ASGI", "prefork ASGI, access log")


@dataclass(frozen=True, slots=True)
class Scenario:
    """*title* is for people. *app* is the application in apps.py.

    *tool* is who makes the load: wrk, or one of the two of client.py, with *size*-byte
    messages, of which *window* are on their way in each connection. *script* and its
    argument are wrk's. *only* names the servers, and *without* those that can not do it.
    """

    name: str
    title: str
    app: str
    unit: str = "req/s"
    headers: tuple[str, ...] = BROWSER
    connections: int = 64
    tool: str = "wrk"
    script: tuple[str, ...] = ()
    size: int = 0
    window: int = 1
    tls: bool = False
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


SCENARIOS = (
    Scenario("hello", "hello, 12 browser headers", "hello"),
    Scenario("hello-host", "hello, Host only", "hello", headers=()),
    Scenario("post", "POST echo, 1 KB of JSON", "echo", script=("post", "1024")),
    Scenario("large", "64 KB response (nginx: a file)", "large"),
    Scenario("upload", "upload, 1 MB", "upload", connections=16, script=("post", "1048576")),
    Scenario("download", "download, 100 MB from the application", "download", "MB/s", connections=4, tool="download"),
    Scenario("file", "download, a file of 100 MB", "file", "MB/s", connections=4, tool="download"),
    Scenario("chunks", "1000 small chunks", "chunks"),
    Scenario(
        "websocket", "WebSocket echo, 125 B", "websocket", "msg/s", tool="websocket", connections=32, size=125, window=4
    ),
    Scenario(
        "websocket-64k",
        "WebSocket echo, 64 KB",
        "websocket",
        "msg/s",
        tool="websocket",
        connections=16,
        size=65536,
        window=2,
    ),
    Scenario("connect", "a new connection for each request", "hello", headers=CLOSING),
    Scenario("tls", "hello over TLS", "hello", tls=True, without=("bjoern",)),
    # bjoern answers the first of the batch and then nothing.
    Scenario("pipelined", "hello, 16 requests pipelined", "hello", script=("pipelined",), without=("bjoern",)),
    Scenario("access-log", "hello, access log off and on", "hello", only=LOGGED),
)
