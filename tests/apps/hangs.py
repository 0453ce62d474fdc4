"""A module that never finishes importing."""

import time

print("importing", flush=True)
time.sleep(3600)
