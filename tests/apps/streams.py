"""WSGI that streams until it is closed, and says so."""

import itertools
import time


def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return pieces()


def pieces():
    try:
        for _ in itertools.count():
            yield b"tick\n"
            time.sleep(0.05)
    finally:
        print("the stream was closed", flush=True)
