# The API, the migrations and the command line. No torch: this image stays small.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
WORKDIR /app
RUN useradd --create-home --uid 10001 shadowft \
 && install -d -o shadowft -g shadowft -m 0750 /data

# Third-party packages first: they change less often than the code.
COPY pyproject.toml requirements.lock README.md LICENSE ./
RUN python -c "import tomllib; print('\n'.join(tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies']))" > /tmp/dependencies \
 && pip install -c requirements.lock -r /tmp/dependencies
COPY core core
COPY api api
COPY worker worker
COPY cli cli
COPY demo demo
COPY migrations migrations
RUN pip install --no-deps .

USER shadowft
ENV SHADOWFT_DATA_DIR=/data SHADOWFT_HOST=0.0.0.0 SHADOWFT_LOG_FORMAT=json
WORKDIR /data
EXPOSE 8000
CMD ["shadowft", "api"]
