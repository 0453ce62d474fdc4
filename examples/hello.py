"""The smallest application: a native handler.

    prefork serve examples.hello:handler --workers 2
    curl http://127.0.0.1:8000/

What it returns becomes the response: text, bytes, JSON from a dict or a list, 204 from
None, or a `Response` for everything else.
"""

from prefork import Request, Response


async def handler(request: Request) -> object:
    match request.path:
        case "/":
            return f"Hello from worker {request.worker.id}\n"
        case "/json":
            return {"hello": "world", "query": dict(request.query)}
        case "/echo":
            return await request.body()
        case _:
            return Response("no such page\n", status=404)
