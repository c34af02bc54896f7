#!/bin/sh
# Installs a Debian package without starting the service that comes with it: install_package.sh NAME. As root.
set -eu

echo "installing $1 (the system's service is not started) ..."
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
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
