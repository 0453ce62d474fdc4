"""Messages between processes, each of which may own descriptors. Knows nothing of workers."""
