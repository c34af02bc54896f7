#!/bin/sh
# setup.sh: makes, once, what the services of compose.yaml start with: certificates, an account for each party with its
# file of credentials, RabbitMQ's definitions of them, and example texts for each node that was given none. Run again, it
# makes what is missing and leaves the rest. Every file is written beside and renamed: one that is there is whole.
# setup.sh add-node NAME URL: an account for one more node, which comes from elsewhere; its file goes to /out.
# Environment, words each: NODES, those of them that were GIVEN a corpus, HOSTS; RABBITMQ (a version, such as 4 or 3.10).
set -eu
umask 077

broker=amqps://rabbitmq:5671/
ca=/authority/ca.pem

# account ORDER PARTY FOLDER COMMAND…: the party's credentials, then its part of the definitions. RabbitMQ loads the parts
# by their names' order, and the master's has what those of the nodes refer to.
account() {
    file=$1-$2.json out=$3
    shift 3
    [ -e "/definitions/$file" ] && return
    shared-encoder broker "$@" --out "$out" --ca-file "$ca" --broker "$broker" --server "$RABBITMQ" \
        --print definitions >"/definitions/.$file"
    chmod 644 "/definitions/.$file"
    mv "/definitions/.$file" "/definitions/$file"
}

if [ "${1:-}" = add-node ]; then
    name=${2:?NAME of the node} broker=${3:?URL of the broker, as the node sees it: amqps://HOST:5671/}
    rm -f "/definitions/2-$name.json" # again: a new password
    account 2 "$name" /out add-node "$name" --type text
    chown --reference=/out "/out/$name.toml"
    echo "to let it in: docker compose exec rabbitmq rabbitmqctl import_definitions /definitions/2-$name.json"
    exit
fi

if [ "$(cat /tls/hosts 2>/dev/null)" != "$HOSTS " ]; then
    hosts=
    for name in rabbitmq localhost $HOSTS; do hosts="$hosts --host $name"; done
    # shellcheck disable=SC2086 # an option and a word each
    shared-encoder broker certs /authority --days 825 $hosts >/dev/null
    # the broker's volume has its own key alone, for whatever user its image has; the authority's key stays here
    for file in ca.pem server.pem server-key.pem; do
        install -m 644 "/authority/$file" "/tls/.$file"
        mv "/tls/.$file" "/tls/$file"
    done
    echo "$HOSTS " >/tls/hosts
    echo "certificates for rabbitmq, localhost $HOSTS"
fi

account 1 master /credentials/master init
account 2 operator /credentials/operator add-operator operator
for node in $NODES; do account 2 "$node" "/credentials/$node" add-node "$node" --type text; done

for node in $NODES; do
    case " $GIVEN " in *" $node "*) continue ;; esac
    [ -n "$(ls "/corpus/$node")" ] && continue
    [ -d /tmp/example ] || shared-encoder corpus example /tmp/example >/dev/null
    topic=$(ls /tmp/example | sed -n 1p)
    install -m 644 "/tmp/example/$topic"/*.jsonl "/corpus/$node"
    rm -r "/tmp/example/$topic"
    echo "$node: texts of this Python's own library, about $topic"
done

# whoever the services run as, they are of group 0
chmod 755 /definitions /tls
chown -R 10001:0 /credentials/*
