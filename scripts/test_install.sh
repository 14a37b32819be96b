#!/usr/bin/env bash
# Install the package as a user does, and use it in an empty folder: type the commands of README.md, from
# `pip install .` into an empty environment on, and some more. Then install the reference engine by the
# commands that its error message prints, and the package once more with `uv tool install`.
#   bash scripts/test_install.sh [PYTHON]    # default: python3
# MAML_OMNIGLOT_ROOT must hold Omniglot: its characters are the folder of pictures that README.md trains on.
# It takes minutes, most of them for pip to download PyTorch with CUDA (3 GB), and 6 GB in TMPDIR meanwhile.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${1:-python3}
omniglot=$(realpath -m "${MAML_OMNIGLOT_ROOT:-data/omniglot}")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH VIRTUAL_ENV PYTHONHOME

step() {
    echo "[$SECONDS s] $*"
}

# Run `expect TEXT COMMAND ...`: the command must succeed, and print the text.
expect() {
    local text=$1 output
    shift
    echo "+ $*"
    output=$("$@" 2>&1) || fail "$* failed: $output"
    [[ $output == *"$text"* ]] || fail "$* does not print '$text': $output"
}

# Run `refuse TEXT COMMAND ...`: the command must fail, and print the text; its output is left in `refusal`.
refuse() {
    local text=$1
    shift
    echo "+ $*"
    ! refusal=$("$@" 2>&1) || fail "$* did not fail"
    [[ $refusal == *"$text"* ]] || fail "$* does not print '$text': $refusal"
}

# Run a command that prints much, which is shown only if it fails.
log() {
    echo "+ $*"
    "$@" >"$work/log" 2>&1 || fail "$* failed: $(cat "$work/log")"
}

# Make a folder of pictures, with a folder for each class: the characters of Omniglot's evaluation half.
unpack_pictures() {
    local found
    found=$(find -L "$omniglot" -name images_evaluation -o -name images_evaluation.zip | head -n 1)
    [ -n "$found" ] || fail "there is no Omniglot in $omniglot; set MAML_OMNIGLOT_ROOT"
    [ -d "$found" ] || "$python" -m zipfile -e "$found" "$work/omniglot"
    [ -d "$found" ] || found=$work/omniglot/images_evaluation
    for character in "$found"/*/*/; do
        mkdir -p "$1"
        cp -r "$character" "$1/$(basename "$(dirname "$character")")_$(basename "$character")"
    done
}

fail() {
    echo "test_install.sh: error: $*" >&2
    exit 1
}

step "Typing the commands of README.md, from its installation with pip on"
"$python" -m venv "$work/env"
mkdir "$work/folder"
unpack_pictures "$work/folder/pictures"
"$python" "$root/scripts/run_readme.py" --environment "$work/env" --folder "$work/folder"
PATH=$work/env/bin:$PATH
cd "$work/folder"

step "Using it"
expect "maml 0" maml --version
expect "omniglot/5way_1shot" maml configs
refuse "No module named" python -c "import learn2learn"
expect "runs/toy-second-s0" maml report runs
expect "They agree" maml derive
expect "export MAML_PYTHON=$work/env/bin/python" maml submit --dry_run --config toy
expect "--array=0,1" maml submit --tradeoff --dry_run --config toy --orders first,second --out grid
expect "True" python -c "import importlib.resources as r; print((r.files('maml_pipeline') / 'py.typed').is_file())"

step "Installing the reference engine"
refuse "engine learn2learn needs learn2learn" maml fit --config toy --model.engine learn2learn
log bash -euc "${refusal##*$'\n'}"
expect "Test of best.ckpt" maml fit --config toy --model.engine learn2learn --trainer.max_steps 100

step "Installing it with uv tool install"
export UV_TOOL_DIR=$work/tools UV_TOOL_BIN_DIR=$work/bin
bash "$root/scripts/uv.sh" tool install --quiet --python "$python" "$root"
expect "Test of best.ckpt" "$work/bin/maml" fit --config toy --trainer.max_steps 100 --run.dir runs/uv
step "Passed"
