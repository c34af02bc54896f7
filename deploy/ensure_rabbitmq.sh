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

echo "installing rabbitmq-server (the system's service is not started) ..."
# policy-rc.d is Debian's way to forbid packages to start services; one that is there already is left alone
policy=/usr/sbin/policy-rc.d
made=
if [ ! -e "$policy" ]; then
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
    made=yes
fi
trap '[ -z "$made" ] || rm -f "$policy"' EXIT
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends rabbitmq-server >/dev/null
