"""HTTP/1.1 between bytes and events: no I/O, no clock, no event loop."""
