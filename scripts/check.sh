#!/usr/bin/env bash
# Lint, formatting and types of the Python code; lint of the shell and job scripts.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/uv.sh run --locked ruff check .
bash scripts/uv.sh run --locked ruff format --check .
bash scripts/uv.sh run --locked mypy
bash scripts/uv.sh run --locked shellcheck --external-sources --source-path=slurm \
    scripts/*.sh .ci/run slurm/*.sh slurm/*.sbatch slurm/cluster.env
