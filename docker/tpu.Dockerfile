# Trains on TPUs: docker build -f docker/tpu.Dockerfile -t IMAGE .
FROM python:3.12.11-slim-bookworm

# TPU devices belong to root on their machines, so this image stays root, unlike the one for GPUs.
WORKDIR /mor_jax

COPY requirements.lock requirements.txt requirements-tpu.txt ./
RUN pip install --no-cache-dir -c requirements.lock -r requirements.txt -r requirements-tpu.txt

COPY pyproject.toml README.md LICENSE ./
COPY mor_jax mor_jax
COPY configs configs
COPY launch launch

# Output as it comes, and no compiled files beside sources that the user may not write.
ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
CMD ["python", "launch/train.py", "--help"]
