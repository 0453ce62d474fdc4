"""prefork: a pre-fork HTTP server toolkit. The public names, nothing else."""

from prefork import cluster
from prefork.control.serve import serve
from prefork.errors import PreforkError
from prefork.gateway.message import Request, Response

__all__ = ["PreforkError", "Request", "Response", "cluster", "serve"]
