#!/usr/bin/env bash
# Run the tests on the oldest or the newest versions of the dependencies, in an environment of its own.
# It leaves .venv/ and uv.lock unchanged.
#   bash scripts/test_versions.sh oldest [ARGUMENTS]    # the lower bounds of pyproject.toml
#   bash scripts/test_versions.sh newest [ARGUMENTS]    # the latest releases, beyond the upper bounds too
# Arguments go to pytest. Without any, the default tests run, including the canaries
# (tests/test_internals_*.py). The environment is MAML_VERSIONS_ENV (default: .venv-oldest/ or
# .venv-newest/) and takes about 6 GB.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

versions=${1-}
case $versions in
oldest) resolution=(--resolution lowest-direct) ;;
newest) resolution=(--upgrade) ;;
*)
    echo "usage: bash scripts/test_versions.sh oldest|newest [PYTEST ARGUMENTS]" >&2
    exit 2
    ;;
esac
shift

# Print the dependencies without their upper bounds; exact versions stay.
requirements() {
    sed -n '/^dependencies = \[/,/^\]/p' pyproject.toml |
        grep -oE '"[^"]+"' | tr -d '"' | sed -E 's/,?<[0-9.]+//'
}

export VIRTUAL_ENV=${MAML_VERSIONS_ENV:-$PWD/.venv-$versions}
bash scripts/uv.sh venv --quiet --allow-existing --python 3.11 "$VIRTUAL_ENV"
requirements | bash scripts/uv.sh pip install "${resolution[@]}" --requirements - --group dev
bash scripts/uv.sh pip install --quiet --no-deps --editable .
if [ $# -eq 0 ]; then
    set -- -n auto --dist loadfile
fi
# Other versions emit other warnings, so a warning is not an error here.
exec "$VIRTUAL_ENV/bin/python" -m pytest -W default "$@"
