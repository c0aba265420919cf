#!/usr/bin/env bash
# Set up and check everything: lint, format, types, tests. Further arguments go to pytest (-m "not slow" for the fast ones).
# Tests that open a page in a browser take Chromium, from Debian's packages where it is missing and root may install it; without
# it they say that they were skipped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-demo.txt requirements-dev.txt

has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
if ! has_browser && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium (once, a minute)"
    {
        timeout 120 apt-get -qq update && DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y --no-install-recommends chromium
    } >/dev/null 2>&1 || echo "chromium could not be installed; tests that need a browser are skipped" >&2
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 "$@"
