#!/bin/sh
# The suite with Debian 13's own Python (3.13) and RabbitMQ (4), in a container: sh tests/containers/suite.sh [pytest's arguments]
set -eu
cd "$(dirname "$0")/../.."
docker build -q --build-arg TORCH_INDEX="${TORCH_INDEX:-}" -f tests/containers/suite.Dockerfile -t shared-encoder-suite . >/dev/null
git ls-files -co --exclude-standard -z | tar c --null -T - |
    docker run --rm -i shared-encoder-suite sh -c '
        mkdir /work && cd /work && tar x && pip install --quiet --no-deps -e . && exec python -m pytest "$@"' suite "$@"
