# The worker: PyTorch for CUDA with the modelling libraries. Runs with a GPU or without one (then it predicts).
# Give the container shared memory: docker run --gpus 1 --shm-size 8g ...
# The base's torch must be the version that requirements.lock pins.
ARG PYTORCH_IMAGE=pytorch/pytorch:2.13.0-cuda13.0-cudnn9-runtime
FROM ${PYTORCH_IMAGE}

WORKDIR /src
COPY pyproject.toml README.md LICENSE requirements.lock ./
COPY planner ./planner
COPY api ./api
COPY workers ./workers
COPY migrations ./migrations
# The base's pip belongs to its distribution in some releases; the images are ours alone, so that guard is of no use here.
RUN PIP_BREAK_SYSTEM_PACKAGES=1 pip install --no-cache-dir --constraint requirements.lock ".[torch,server,transformers,vision]" \
    && useradd --create-home planner
USER planner
WORKDIR /home/planner

# A worker runs models offline: nothing is downloaded on behalf of a spec.
ENV HF_HUB_OFFLINE=1
CMD ["planner", "worker"]
