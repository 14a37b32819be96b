#!/usr/bin/env bash
# Run uv; where the machine has none, put it into .uv/ first. The system's Python is not touched.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if command -v uv >/dev/null; then
    exec uv "$@"
fi
if [ ! -x "$root/.uv/bin/uv" ]; then
    echo "uv is not installed: putting it into $root/.uv" >&2
    python3 -m venv "$root/.uv"
    "$root/.uv/bin/python" -m pip install --quiet uv
fi
exec "$root/.uv/bin/uv" "$@"
