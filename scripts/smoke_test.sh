#!/usr/bin/env bash
# Install the locked dependencies and meta-train the toy task with the default gradient orders, on the CPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec bash scripts/uv.sh run --locked python scripts/smoke_test.py
