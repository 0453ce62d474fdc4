"""A WSGI application by hand. Flask, Django, Bottle and the like are served the same way.

    prefork serve examples.wsgi:app --threads 8

It runs in the worker's threads, so it may block; `--threads 0` runs it in the event loop.
"""


def app(environ, start_response):
    size = 0
    while piece := environ["wsgi.input"].read(65536):  # an upload is read as it arrives
        size += len(piece)
    body = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} with {size} bytes\n".encode()
    start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", str(len(body)))])
    return [body]
