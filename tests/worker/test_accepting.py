"""Accepting when there is nothing left to accept with, and the counters that others read."""

from __future__ import annotations

import asyncio
import json
import os
import socket

import pytest
import uvloop

from prefork.gateway.exchange import Exchange
from prefork.protocol.limits import Limits
from prefork.scoreboard import Scoreboard
from prefork.worker.server import Server as WorkerServer
from prefork.worker.service import Service, Timeouts
from tests.harness.client import Client
from tests.harness.server import Server

# Descriptors for a worker that has some twenty of its own.
FEW = 40

LOOPS = {"uvloop": uvloop.new_event_loop, "asyncio": asyncio.new_event_loop}


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
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
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

    async def run(board: Scoreboard, listening: socket.socket) -> None:
        service = make_service(board)
        server = WorkerServer(service, None)
        server.open([listening])
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        writer.write(ENDINGS[ending])
        if half_close:
            writer.write_eof()
            with_reset = await asyncio.gather(reader.read(), return_exceptions=True)
            assert isinstance(with_reset[0], bytes | ConnectionResetError)
        writer.close()
        slot = service.slot
        async with asyncio.timeout(10):
            while not (slot.opened and service.is_idle):
                service.something_ended.clear()
                await service.something_ended.wait()
        assert (slot.opened, slot.closed, slot.connections, slot.in_flight) == (1, 1, 0, 0)
        await server.drain(1)

    board = Scoreboard(1)
    listening = socket.create_server(("127.0.0.1", 0))
    listening.setblocking(False)
    try:
        with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
            runner.run(run(board, listening))
    finally:
        listening.close()
        board.close()


def make_service(board: Scoreboard) -> Service:
    return Service(
        loop=asyncio.get_running_loop(),
        gateway=gateway,
        limits=Limits(),
        timeouts=Timeouts(head=5, body=5, keep_alive=5, write=5),
        slot=board[0],
        access_log=None,
        server_header=b"",
        worker_id=1,
    )


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
