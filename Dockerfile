# The server on a Linux CPU: docker build -t mlx-edge . && docker run -e MLX_EDGE_API_KEY=... -p 127.0.0.1:8080:8080 mlx-edge
FROM python:3.11-slim AS build
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /source
COPY . .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.11-slim
RUN useradd --create-home --uid 10001 edge && mkdir -p /models /cache && chown edge /cache
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH MLX_EDGE_CACHE=/cache/packed HF_HOME=/cache/hub
USER edge
EXPOSE 8080
# It listens for others, so it does not start without MLX_EDGE_API_KEY or --api-key-file.
ENTRYPOINT ["python", "-m", "mlx_edge.serve"]
CMD ["--host", "0.0.0.0"]
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s CMD \
  ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8080/health', timeout=4)"]
