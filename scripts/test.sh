#!/usr/bin/env bash
# Install everything, then run lint, format check, type check and tests. Arguments are passed to pytest (-m "not slow": fast tests).
# Tests of HTML reports need Chromium. It is installed from Debian's packages when missing and run as root; without it they are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-demo.txt requirements-dev.txt

has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
if ! has_browser && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium (once; takes a minute)"
    {
        timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y --no-install-recommends chromium
    } >/dev/null 2>&1 || echo "chromium could not be installed; tests that need a browser will be skipped" >&2
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 "$@"
