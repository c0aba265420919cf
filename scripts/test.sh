#!/usr/bin/env bash
# Set up and check everything: lint, format, types, tests. Further arguments go to pytest (-m "not slow" for the fast ones).
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-dev.txt

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 "$@"
