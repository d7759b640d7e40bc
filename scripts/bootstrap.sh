#!/bin/sh
# Usage: bootstrap.sh VENV REQUIREMENTS [PIP-OPTION...]
# Makes the virtual environment VENV if need be and installs the pinned REQUIREMENTS into it.
# PYTHON chooses the interpreter; without it the first suitable one on the PATH is taken.
set -eu
venv=$1
requirements=$2
shift 2

fail() {
    printf 'bootstrap: %s\n' "$@" >&2
    exit 1
}

new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python=${PYTHON:-}
    if [ -z "$python" ]; then
        for candidate in python3 python3.11 python3.12 python3.13 python3.14 python3.15; do
            if new_enough "$candidate"; then
                python=$candidate
                break
            fi
        done
    fi
    [ -n "$python" ] || fail "no Python 3.11 or newer on the PATH ($(python3 --version 2>&1 || true))." \
        "Install one, or name it: make PYTHON=/path/to/python3.11"
    command -v "$python" >/dev/null || fail "PYTHON=$python: no such program."
    new_enough "$python" || fail "$python is $("$python" --version 2>&1), expected 3.11 or newer."
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python lacks the venv module with ensurepip." \
        "On Debian and Ubuntu it is the package python3-venv."
    "$python" -c 'import sys; sys.exit(sys.version_info >= (3, 16))' ||
        printf 'bootstrap: %s is newer than the pinned torch knows; pip may find no build of it.\n' "$python" >&2
    printf 'bootstrap: making %s with %s (%s)\n' "$venv" "$python" "$("$python" --version 2>&1)" >&2
    "$python" -m venv --clear "$venv"
fi

printf 'bootstrap: installing %s\n' "$requirements" >&2
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@" -r "$requirements" ||
    fail "pip could not install $requirements with $("$venv/bin/python" --version); its own message is above."
