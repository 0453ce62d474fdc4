"""One worker process, from its fork to its exit."""
