"""How an application is called: loading it, and ASGI, WSGI and native handlers over one `Exchange`."""
