#!/bin/sh
# Base images for a machine that reaches no registry of images: Debian 13's own packages under the names that
# compose.yaml and the tests ask for (rabbitmq:4-management, prom/prometheus, debian:trixie-slim). Those that are there are left alone.
# As root: apt-get install mmdebstrap; sh tests/containers/base_images.sh
# They differ from the official ones in their versions and entrypoints.
set -eu
there() { docker image inspect "$1" >/dev/null 2>&1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! there debian:trixie-slim; then
    mmdebstrap --quiet --variant=minbase --include=ca-certificates trixie "$folder/trixie.tar"
    docker import "$folder/trixie.tar" shared-encoder-trixie >/dev/null
    # this machine's authorities: a network of one's own may sign what it lets through
    cp /etc/ssl/certs/ca-certificates.crt "$folder/ca.crt"
    docker build -q -t debian:trixie-slim -f - "$folder" <<'D'
FROM shared-encoder-trixie
COPY ca.crt /etc/ssl/certs/ca-certificates.crt
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt
D
fi

there rabbitmq:4-management || docker build -q -t rabbitmq:4-management - <<'D'
FROM debian:trixie-slim
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends rabbitmq-server \
    && rm -rf /var/lib/apt/lists/*
RUN printf 'loopback_users = none\n' >/etc/rabbitmq/rabbitmq.conf
EXPOSE 5672 5671
CMD ["rabbitmq-server"]
D

there prom/prometheus || docker build -q -t prom/prometheus - <<'D'
FROM debian:trixie-slim
RUN apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* && install -d -o prometheus /prometheus
USER prometheus
ENTRYPOINT ["/usr/bin/prometheus"]
D
