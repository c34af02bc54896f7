#!/bin/sh
# Takes the packages' own tests out of a virtual environment, for an image: slim.sh FOLDER
set -eu
cd "$1"/lib/python3*/site-packages
find . -type d -name tests -prune -exec rm -r {} +
rm -rf torch/test
# torch's tests in C++ and its compiler of messages; the manager of shared memory is used
find torch/bin -type f ! -name torch_shm_manager -delete
