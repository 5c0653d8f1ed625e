# Two stages: the first builds a virtual environment, the second holds that and nothing to build with.
FROM python:3.11-slim AS build
WORKDIR /src
RUN python -m venv /opt/scanwire
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY static static
RUN /opt/scanwire/bin/pip install --no-cache-dir .

FROM python:3.11-slim
COPY --from=build /opt/scanwire /opt/scanwire
RUN useradd --system --create-home --home-dir /var/lib/scanwire scanwire
USER scanwire
ENV PATH=/opt/scanwire/bin:$PATH \
    SCANWIRE_STATE_DIR=/var/lib/scanwire/state \
    SCANWIRE_LOG_FORMAT=json
VOLUME /var/lib/scanwire
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=30s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/healthz', timeout=2)"]
STOPSIGNAL SIGTERM
# The exec form: the server itself gets SIGTERM, and drains.
ENTRYPOINT ["scanwire"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
