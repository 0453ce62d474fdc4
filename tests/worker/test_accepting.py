"""Accepting when there is nothing left to accept with, and the counters that others read."""

from __future__ import annotations

import asyncio
import json
import os

import pytest

from prefork.gateway.exchange import Exchange
from prefork.worker.service import Service
from tests.harness.client import Client
from tests.harness.server import Server, stat
from tests.harness.worker import LOOPS, Address, run_beside_worker, until

# Descriptors for a worker that has some twenty of its own.
FEW = 40


@pytest.mark.parametrize("loop", LOOPS)
def test_worker_out_of_descriptors_pauses_and_goes_on(loop):
    """It says so, does not spin, drops nobody: whoever waits is served when others have gone."""
    with Server("tests.apps.few_files:app", workers=1, loop=loop, environ={"FEW_FILES": str(FEW)}) as server:
        server.wait_ready(1)
        pid = server.worker(1)
        clients = [Client(server.port) for _ in range(FEW + 10)]
        try:
            for client in clients:
                client.send(b"GET / HTTP/1.1\r\nHost: t\r\n\r\n")
            before = processor_time(pid)
            server.wait_for(r"error cannot accept a connection: too many open files; trying again in 1 s", 3)
            assert server.log.count("cannot accept") < 6
            assert processor_time(pid) - before < 0.3, "it spins"
            for client in clients:
                assert client.read().text == "hello"
                client.close()
        finally:
            for client in clients:
                client.close()
        assert server.worker(1) == pid
        assert " ended" not in server.log


def processor_time(pid: int) -> float:
    """Seconds."""
    fields = stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- the counters on the scoreboard ----


ENDINGS = {
    "nothing asked": b"",
    "one request": b"GET / HTTP/1.1\r\nHost: t\r\n\r\n",
    "three requests": b"GET / HTTP/1.1\r\nHost: t\r\n\r\n" * 3,
    "a refusal": b"BAD\r\n\r\n",
    "half a head": b"GET / HT",
    "half a body, which the application waits for": b"POST /read HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\nhalf",
    "a broken body": b"POST /read HTTP/1.1\r\nHost: t\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "an unread body": b"POST / HTTP/1.1\r\nHost: t\r\nContent-Length: 9\r\n\r\nhalf",
    "an application that fails": b"GET /fail HTTP/1.1\r\nHost: t\r\n\r\n",
    "an application that fails late": b"GET /fail-late HTTP/1.1\r\nHost: t\r\n\r\n",
    "an application that gives up": b"GET /give-up HTTP/1.1\r\nHost: t\r\n\r\n",
}


async def gateway(exchange: Exchange) -> None:
    match exchange.request.path:
        case b"/read":
            while await exchange.read():
                pass
        case b"/fail":
            raise RuntimeError("this gateway fails")
        case b"/fail-late":
            exchange.start(200, [])
            exchange.send(b"begun", True)
            raise RuntimeError("this gateway fails late")
        case b"/give-up":
            return
    exchange.start(200, [])
    exchange.send(b"hello", False)


@pytest.mark.parametrize("half_close", [True, False], ids=["half-closes", "closes"])
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("loop", LOOPS)
def test_counters_return_to_zero(loop, ending, half_close):
    """However a connection ends: handoff gives work by these numbers."""

    async def test(service: Service, address: Address) -> None:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(ENDINGS[ending])
        if half_close:
            writer.write_eof()
            with_reset = await asyncio.gather(reader.read(), return_exceptions=True)
            assert isinstance(with_reset[0], bytes | ConnectionResetError)
        writer.close()
        slot = service.slot
        await until(lambda: bool(slot.opened) and service.is_idle, service)
        assert (slot.opened, slot.closed, slot.connections, slot.in_flight) == (1, 1, 0, 0)

    run_beside_worker(test, gateway, loop=loop)


# ---- the access log ----


def test_access_log_has_one_line_for_each_answer():
    """Status, bytes of body, worker; 499 for a client that left before its answer."""
    with Server("tests.apps.bodies:app", workers=1, access_log="-", graceful_timeout=0.1) as server:
        server.wait_ready(1)
        with Client(server.port) as client:
            client.get("/?a=%22")
            client.get("/fail")
            client.request("HEAD", "/empty")
            client.get("/flood?size=100000")
            client.send(b"GET /wait?event=another HTTP/1.1\r\nHost: t\r\nConnection: close\r\n\r\nx")
        with Client(server.port) as client:
            client.send(b"POST /leave?event=never HTTP/1.1\r\nHost: t\r\nContent-Length: 5\r\n\r\nhalf")
        for line in [
            r'"GET /\?a=%22 HTTP/1.1" 200 5 0\.\d{6} worker 1$',
            r'"GET /fail HTTP/1.1" 500 21 0\.\d{6} worker 1$',
            r'"HEAD /empty HTTP/1.1" 204 0 0\.\d{6} worker 1$',
            r'"GET /flood\?size=100000 HTTP/1.1" 200 131072 \d\.\d{6} worker 1$',
            r'"POST /leave\?event=never HTTP/1.1" 499 0 \d\.\d{6} worker 1$',
        ]:
            server.wait_for(r"^\S+Z 127\.0\.0\.1 " + line)
        assert server.log.count('HTTP/1.1" ') == 5, "a waiting application has not answered, and has no line yet"


def test_access_log_as_json():
    with Server("tests.apps.bodies:app", workers=1, access_log="-", log_format="json") as server:
        server.wait_for(r"is listening, ")
        port = int(server.wait_for(r"listening on http://127.0.0.1:(\d+)")[1])
        with Client(port) as client:
            client.get("/json")
        line = json.loads(server.wait_for(r'^\{.*"target": "/json".*\}$')[0])
        assert (line["status"], line["size"], line["method"], line["worker"]) == (200, 5, "GET", 1)
