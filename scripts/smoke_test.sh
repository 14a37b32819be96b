#!/usr/bin/env bash
# Install what is locked and meta-train the toy task with both gradient orders, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/uv.sh run --locked python scripts/smoke_test.py
