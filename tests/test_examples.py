"""Every example runs, and does what its docstring says."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from contextlib import ExitStack

from websockets.sync.client import connect

from tests.harness.client import Client, get
from tests.harness.server import DEADLINE, ROOT, Server

SERVED = {"hello": "handler", "asgi": "app", "wsgi": "app", "websocket": "handler", "chat": "handler"}
PROGRAMS = {"embedded", "cluster", "cluster_basic"}


def program(name):
    return Server(None, command=[sys.executable, "-m", f"examples.{name}"], environ={"BIND": "127.0.0.1:0"})


def test_every_example_is_started_by_a_test():
    """An example that nothing runs is wrong sooner or later."""
    names = {path.stem for path in (ROOT / "examples").glob("*.py")}

    assert names == SERVED.keys() | PROGRAMS | {"hooks"}


def test_hello():
    """The native handler and its shorthand answers."""
    with Server("examples.hello:handler", workers=2) as server, Client(server.port) as client:
        assert re.fullmatch(r"Hello from worker [12]\n", client.get("/").text)
        assert client.get("/json?a=1").text == '{"hello":"world","query":{"a":"1"}}'
        assert client.request("POST", "/echo", body=b"abc").body == b"abc"
        assert client.get("/nowhere").status == 404


def test_asgi():
    """The lifespan's state reaches the requests."""
    with Server("examples.asgi:app", workers=1) as server:
        assert re.fullmatch(r"this worker has served for \d+\.\d s\n", get(server.port).text)


def test_wsgi():
    """An upload is read as it arrives."""
    with Server("examples.wsgi:app", workers=1) as server, Client(server.port) as client:
        assert client.request("POST", "/up", body=bytes(100_000)).text == "POST /up with 100000 bytes\n"


def test_websocket():
    """What one says, the other hears; the page that does so in a browser comes from the same handler."""
    with Server("examples.websocket:handler", workers=1) as server:
        assert "new WebSocket" in get(server.port).text
        url = f"ws://127.0.0.1:{server.port}/"
        with connect(url) as one, connect(url) as other:
            other.send("hello")
            assert (one.recv(DEADLINE), other.recv(DEADLINE)) == ("hello", "hello")


def test_chat():
    """Clients of different workers hear one another, each sender's messages in the order in which they were said."""
    count, each = 8, 20
    # Handed over by the master, connections are spread evenly however few they are.
    with Server("examples.chat:handler", workers=4, sharing="handoff") as server, ExitStack() as stack:
        server.wait_ready(4)
        assert "new WebSocket" in get(server.port).text
        clients = [stack.enter_context(connect(f"ws://127.0.0.1:{server.port}/")) for _ in range(count)]
        for number, client in enumerate(clients):
            client.send(f"{number} is here")
            # What it says itself comes back through the master, which therefore knows of its worker's subscription.
            heard = json.loads(client.recv(DEADLINE))
            while heard["text"] != f"{number} is here":
                heard = json.loads(client.recv(DEADLINE))
        for index in range(each):
            for number, client in enumerate(clients):
                client.send(f"{number} says {index}")
        for client in clients:
            heard = []
            while len(heard) < count * each:
                message = json.loads(client.recv(DEADLINE))
                if "says" in message["text"]:
                    heard.append(message)
            for number in range(count):
                said = [message["text"] for message in heard if message["text"].startswith(f"{number} ")]
                assert said == [f"{number} says {index}" for index in range(each)]
            assert {message["worker"] for message in heard} == {1, 2, 3, 4}


def test_embedded():
    """The program gets the control back when the server was stopped."""
    with program("embedded") as server:
        server.wait_for(r"worker 2 answers on http://127\.0\.0\.1:\d+")
        assert get(server.port).text.startswith("served by a program")
        server.signal(signal.SIGINT)
        assert server.wait_exit() == 0

    assert "stopped, and back in the program" in server.log


def test_hooks():
    """They see the workers come and go."""
    with Server("examples.hello:handler", workers=1, hooks="examples.hooks:register") as server:
        server.wait_for(r"worker 1 \(.*\) was forked into slot 0")
        server.wait_ready(1)
        server.signal(signal.SIGTERM)
        server.wait_exit()

    assert "ended with code 0; so far: {'retired': 1}" in server.log


def test_cluster_the_worker_leaves_after_three_requests_and_is_replaced():
    """All seven answers arrive, and the counts start again at 1."""
    with program("cluster") as server:
        port = listening(server, 2)
        answers = [get(port).text for _ in range(7)]
        server.wait_for(r"master: exit event \(worker: \d, retired, code 0\)")
        assert listening(server, 3) == port
        server.signal(signal.SIGTERM)
        assert server.wait_exit() == 0

    counts = [int(re.search(r"count: (\d)\n", answer)[1]) for answer in answers]
    assert max(counts) == 3
    assert all(re.match(r"hello world from worker number: \d pid \d+ and", answer) for answer in answers)
    assert "Traceback" not in server.log


def listening(server, worker):
    """The port, as soon as *worker* listens."""
    return int(server.wait_for(rf"master: listening event \(worker: {worker}, pid \d+, 127\.0\.0\.1:(\d+)\)")[1])


def test_cluster_basic_a_worker_that_dies_is_replaced():
    """One for each processor, on one port; a signal from outside ends one, and only that one."""
    count = os.cpu_count()
    with program("cluster_basic") as server:
        ports = {server.wait_for(r"^worker \d+ listens on 127\.0\.0\.1:(\d+)$", n + 1)[1] for n in range(count)}
        (port,) = map(int, ports)
        first = json.loads(get(port).text)
        assert first["worker"] in range(1, count + 1)
        os.kill(first["pid"], signal.SIGKILL)
        server.wait_for(rf"^worker {first['pid']} died$")
        server.wait_for(r"^worker \d+ listens on", count + 1)

        assert json.loads(get(port).text)["pid"] != first["pid"]
        server.signal(signal.SIGINT)
        assert server.wait_exit() == 0

    assert "Traceback" not in server.log
