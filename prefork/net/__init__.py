"""Addresses, listening sockets and TLS. Knows nothing of HTTP."""
