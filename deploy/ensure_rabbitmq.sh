#!/bin/sh
# Makes sure that a RabbitMQ server program is here, for a private broker; says what to install where it may not.
set -eu

[ -n "${AMQP_URL:-}" ] && exit 0
for place in /usr/lib/rabbitmq/bin /usr/local/lib/rabbitmq/bin /opt/rabbitmq/sbin /opt/homebrew/sbin; do
    [ -x "$place/rabbitmq-server" ] && exit 0
done

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "The tests need a RabbitMQ server program, which is not installed." >&2
    echo "Install it (Debian: sudo apt-get install rabbitmq-server), or set AMQP_URL to a broker that tests may use." >&2
    exit 1
fi

sh "$(dirname "$0")/install_package.sh" rabbitmq-server
