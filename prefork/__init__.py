"""prefork: a pre-fork HTTP server toolkit. The public names, nothing else."""

from prefork import cluster
from prefork.control.serve import serve
from prefork.errors import PreforkError, WebSocketDisconnected
from prefork.gateway.message import Request, Response
from prefork.gateway.websocket import WebSocket

__all__ = ["PreforkError", "Request", "Response", "WebSocket", "WebSocketDisconnected", "cluster", "serve"]
