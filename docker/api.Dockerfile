# The web process: no torch, no GPU. Build from the repository's root: docker build -f docker/api.Dockerfile .
FROM python:3.12-slim

WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY planner ./planner
COPY api ./api
COPY workers ./workers
COPY migrations ./migrations
RUN pip install --no-cache-dir --constraint requirements.lock ".[server]" \
    && useradd --create-home planner
USER planner
WORKDIR /home/planner

EXPOSE 8000
CMD ["planner", "serve", "--host", "0.0.0.0", "--port", "8000", "--no-worker"]
