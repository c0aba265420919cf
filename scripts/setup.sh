#!/usr/bin/env bash
# Sourced by demo.sh and test.sh: change to the repository root, create .venv if missing, and define install_requirements.
# A copy of each installed requirements file in .venv lets the next start skip pip.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=.venv/bin/python
if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    base=${PYTHON_BIN:-python3}
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "error: $("$base" --version) is too old; install Python 3.10 or newer, or set PYTHON_BIN to it" >&2
        exit 2
    }
    "$base" -m venv .venv || {
        echo "error: $base cannot create a virtual environment; on Debian and Ubuntu install python3-venv first" >&2
        exit 2
    }
fi

install_requirements() {
    local file stamp
    for file in "$@"; do
        stamp=.venv/installed-$file
        if ! cmp -s "$file" "$stamp"; then
            echo "installing $file into .venv (once; takes some minutes)"
            "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$file"
            cp "$file" "$stamp"
        fi
    done
}
