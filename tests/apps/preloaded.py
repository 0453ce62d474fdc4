"""Tells which process imported it."""

import os

IMPORTED_BY = os.getpid()
print("imported by", IMPORTED_BY, flush=True)


async def app(request):
    return str(IMPORTED_BY)
