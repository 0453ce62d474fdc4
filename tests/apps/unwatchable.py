"""A program whose first child cannot be watched, as when the master is out of descriptors just then."""

import errno
import io
import os
import sys

import prefork

real = os.pidfd_open
calls = []


def pidfd_open(pid):
    calls.append(pid)
    if len(calls) == 1:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return real(pid)


async def app(request):
    return "hello"


if __name__ == "__main__":
    os.pidfd_open = pidfd_open
    sys.stderr = io.StringIO()  # and nothing with a descriptor where it used to be
    prefork.serve(app, bind="127.0.0.1:0", workers=1)
