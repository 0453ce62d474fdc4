"""Hooks: follow the workers of a server that was started from the command line.

    prefork serve examples.hello:handler --hooks examples.hooks:register

The function is called with the cluster, in the master, before the first fork.
"""

from collections import Counter


def register(cluster):
    exits = Counter()

    @cluster.on("fork")
    def forked(worker):
        print(f"{worker.describe()} was forked into slot {worker.slot}", flush=True)

    @cluster.on("exit")
    def exited(worker, code, signal):
        exits[str(worker.exit_cause)] += 1
        why = f"with code {code}" if signal is None else f"by {signal}"
        print(f"{worker.describe()} ended {why}; so far: {dict(exits)}", flush=True)
