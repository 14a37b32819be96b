#!/usr/bin/env bash
# Run uv. If it is not installed, install it into .uv/ first; the system's Python is not changed.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if command -v uv >/dev/null; then
    exec uv "$@"
fi
if [ ! -x "$root/.uv/bin/uv" ]; then
    echo "uv is not installed; installing it into $root/.uv" >&2
    python3 -m venv "$root/.uv"
    "$root/.uv/bin/python" -m pip install --quiet uv
fi
exec "$root/.uv/bin/uv" "$@"
