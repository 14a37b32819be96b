#!/usr/bin/env bash
# Install what is locked and run the tests: without arguments the default set, one process per core; arguments
# go to pytest, which then uses one process.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -eq 0 ]; then
    set -- -n auto --dist loadfile
fi
exec bash scripts/uv.sh run --locked pytest "$@"
