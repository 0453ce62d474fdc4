# An image of prefork that serves the hello example. For an application of your own, start
# from it (FROM prefork), install what the application needs with
#     RUN pip install --no-cache-dir flask
# copy it to /app and name it: CMD ["app:handler"]. Settings are PREFORK_* variables or flags.

FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY prefork prefork
RUN python -m venv /opt/prefork \
 && /opt/prefork/bin/pip install --no-cache-dir .

FROM python:3.13-slim
# A number, so that Kubernetes can tell that it is not root (runAsNonRoot).
RUN groupadd --system --gid 10001 prefork \
 && useradd --system --uid 10001 --gid prefork --no-create-home --home-dir /app prefork
COPY --from=build /opt/prefork /opt/prefork
WORKDIR /app
COPY examples examples
ENV PATH=/opt/prefork/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PREFORK_BIND=0.0.0.0:8000
USER 10001:10001
EXPOSE 8000
# TERM finishes what is in flight; prefork is PID 1, so it gets the signal and reaps orphans.
STOPSIGNAL SIGTERM
# Any answer but a server error is healthy: the application may not know "/".
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
    CMD ["python", "-c", "from http.client import HTTPConnection as C; c = C('127.0.0.1', 8000, timeout=4); c.request('GET', '/'); raise SystemExit(c.getresponse().status >= 500)"]
ENTRYPOINT ["prefork", "serve"]
CMD ["examples.hello:handler"]
