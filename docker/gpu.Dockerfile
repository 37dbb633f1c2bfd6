# Trains on NVIDIA GPUs: docker build -f docker/gpu.Dockerfile -t IMAGE .
# CUDA and cuDNN come with JAX's wheels; the machine brings the driver and NVIDIA's container
# toolkit: docker run --gpus=all --shm-size=8g IMAGE python launch/train.py ...
FROM python:3.12.11-slim-bookworm

RUN useradd --create-home --uid 1000 train
WORKDIR /mor_jax

COPY requirements.lock requirements.txt requirements-gpu.txt ./
RUN pip install --no-cache-dir -c requirements.lock -r requirements.txt -r requirements-gpu.txt

COPY pyproject.toml README.md LICENSE ./
COPY mor_jax mor_jax
COPY configs configs
COPY launch launch

ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER train
CMD ["python", "launch/train.py", "--help"]
