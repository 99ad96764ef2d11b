# A worker: Celery, and the steps with torch as its children.
FROM python:3.11-slim-bookworm

# An index of PyTorch builds, for a CUDA or a CPU variant; empty takes pip's own.
ARG TORCH_INDEX_URL=""

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
RUN useradd --create-home --uid 10001 shadowft \
 && install -d -o shadowft -g shadowft -m 0750 /data

COPY pyproject.toml requirements.lock README.md LICENSE ./
RUN pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep '^torch==' requirements.lock)"
RUN python -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; print('\n'.join(p['dependencies'] + p['optional-dependencies']['worker']))" > /tmp/dependencies \
 && pip install -c requirements.lock -r /tmp/dependencies
COPY core core
COPY api api
COPY worker worker
COPY cli cli
COPY demo demo
COPY migrations migrations
RUN pip install --no-deps .

USER shadowft
ENV SHADOWFT_DATA_DIR=/data SHADOWFT_LOG_FORMAT=json
WORKDIR /data
# The grafting kernels, for the processor of this machine. On another one each graft compiles them for itself: a step
# keeps nothing.
RUN python -c 'from worker.weights.kernels import compile_all; compile_all()'
CMD ["shadowft", "worker", "--queue", "jobs"]
