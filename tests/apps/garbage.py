"""Writes nonsense on the worker's channel to its master."""

import os
import socket


async def app(request):
    for entry in os.listdir("/proc/self/fd"):
        try:
            channel = socket.socket(fileno=os.dup(int(entry)))
        except OSError:  # not a socket
            continue
        with channel:
            # A socket pair has no name, and a peer without one.
            if channel.family == socket.AF_UNIX and channel.getsockname() == "" and is_connected(channel):
                channel.send(b"\xff" * 100)
    return "said"


def is_connected(sock):
    try:
        return sock.getpeername() == ""
    except OSError:
        return False
