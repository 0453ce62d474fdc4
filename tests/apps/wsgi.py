"""A WSGI application: bodies both ways, threads, failures."""

import sys
import threading

released = threading.Event()
rendezvous = threading.Barrier(2, timeout=20)


def app(environ, start_response):
    path = environ["PATH_INFO"]
    headers = [("Content-Type", "text/plain")]
    if path == "/fail":
        raise RuntimeError("this application always fails")
    if path == "/sysexit":
        sys.exit(7)
    if path == "/meet":  # answers only if two requests run at once
        rendezvous.wait()
        body = [b"met"]
    elif path == "/echo":
        body = [environ["wsgi.input"].read()]
    elif path == "/lines":
        body = [b"%d" % sum(1 for _ in environ["wsgi.input"])]
    elif path == "/pieces":
        body = (b"%d\n" % number for number in range(1000))
    elif path == "/hang":
        released.wait()
        body = [b"released"]
    elif path == "/fail-later":
        body = fail_later()
    else:
        body = [b"hello"]
    start_response("200 OK", headers)
    return body


def fail_later():
    yield b"12345"
    raise RuntimeError("this body ends early")
