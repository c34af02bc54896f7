#!/bin/sh
# Makes sure that Prometheus and its promtool are here, for a private one; says what to install where it may not.
set -eu

command -v prometheus >/dev/null && command -v promtool >/dev/null && exit 0

if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "The tests need Prometheus, which is not installed: alerts and dashboard are tried with a real one." >&2
    echo "Install it (Debian: sudo apt-get install prometheus), so that prometheus and promtool are in the PATH." >&2
    exit 1
fi

sh "$(dirname "$0")/install_package.sh" prometheus
