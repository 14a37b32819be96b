#!/usr/bin/env bash
# Lint, formatting and types.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/uv.sh run --locked ruff check .
bash scripts/uv.sh run --locked ruff format --check .
bash scripts/uv.sh run --locked mypy
