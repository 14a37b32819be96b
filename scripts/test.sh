#!/usr/bin/env bash
# Install what is locked and run the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/uv.sh run --locked pytest "$@"
