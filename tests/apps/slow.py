"""A module that takes half a second to import."""

import time

print("importing", flush=True)
time.sleep(0.5)


async def app(request):
    return "hello"
