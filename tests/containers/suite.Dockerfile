# Debian with its own Python and its own RabbitMQ, and everything that the tests need: 13 has Python 3.13 and RabbitMQ 4.
# The source comes when it runs: tests/containers/suite.sh.
ARG DEBIAN_IMAGE=debian:trixie-slim
FROM ${DEBIAN_IMAGE}
ARG TORCH_INDEX=""
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends \
      ca-certificates git make procps prometheus python3 python3-venv rabbitmq-server && rm -rf /var/lib/apt/lists/*
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /dependencies
COPY constraints.txt ./
COPY deploy/install_torch.py deploy/
RUN --mount=type=cache,target=/root/.cache/pip python deploy/install_torch.py --index "$TORCH_INDEX"
COPY pyproject.toml ./
COPY deploy/requirements.py deploy/
RUN --mount=type=cache,target=/root/.cache/pip \
    python deploy/requirements.py >/tmp/base.txt && pip install --quiet -c constraints.txt -r /tmp/base.txt \
    && python deploy/requirements.py dev >/tmp/dev.txt && pip install --quiet -c constraints.txt -r /tmp/dev.txt
