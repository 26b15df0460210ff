# docker build -t reft-server .                              for a CPU; it starts with a key only (run with -e REFT_API_KEY)
# docker build -t reft-server --build-arg TORCH=cu130 .      for an NVIDIA GPU (run with --gpus all -e REFT_DEVICE=cuda)
# docker build -t reft-server --build-arg EXTRAS=s3 .        with optional parts (s3, redis, otel, cluster; several with commas)
# TORCH is the name of one of PyTorch's package indexes; the wheels of a CUDA index bring CUDA themselves.

FROM python:3.11-slim-bookworm AS build
ARG TORCH=cpu
WORKDIR /src
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/reft
# torch comes first and by itself: its layer is the largest and changes least.
COPY constraints.txt ./
RUN /opt/reft/bin/pip install --no-deps --constraint constraints.txt \
        --index-url "https://download.pytorch.org/whl/${TORCH}" torch
COPY pyproject.toml README.md LICENSE ./
COPY server server
COPY reft_runtime reft_runtime
ARG EXTRAS=
RUN /opt/reft/bin/pip install --constraint constraints.txt ".${EXTRAS:+[$EXTRAS]}"

FROM python:3.11-slim-bookworm
# The CPU's fused operators are compiled at the first start, for the CPU at hand.
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --no-log-init --user-group --uid 10001 --home-dir /cache --no-create-home reft \
    && install --directory --owner=reft --group=reft /cache /state
COPY --from=build /opt/reft /opt/reft
COPY interventions /interventions
ENV PATH=/opt/reft/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/cache/huggingface \
    REFT_CACHE=/cache \
    REFT_STATE_DIR=/state \
    REFT_INTERVENTIONS=/interventions \
    REFT_MODEL=demo \
    REFT_HOST=0.0.0.0 \
    REFT_PORT=8000
# By number, so that an orchestrator can see that it is not root.
USER 10001:10001
WORKDIR /state
VOLUME ["/cache", "/state"]
EXPOSE 8000
STOPSIGNAL SIGTERM
# The first start downloads the model before it answers; after that /livez is the engine's heartbeat.
HEALTHCHECK --interval=10s --timeout=5s --start-period=15m --retries=3 \
    CMD ["python", "-c", "import http.client as h, os, sys; c = h.HTTPConnection('127.0.0.1', int(os.environ['REFT_PORT']), timeout=4); c.request('GET', '/livez'); sys.exit(c.getresponse().status != 200)"]
ENTRYPOINT ["reft", "serve"]
