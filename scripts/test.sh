#!/usr/bin/env bash
# Install everything, then run lint, format check, type check and tests. Arguments are passed to pytest (-m "not slow": fast tests).
# Tests of HTML reports need Chromium, those with mmdet the libraries of OpenCV. These are installed from Debian's packages when missing
# and run as root; without them the tests are skipped.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_requirements requirements.txt requirements-demo.txt requirements-dev.txt

has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null
packages=()
has_browser || packages+=(chromium)
"$PYTHON" -c "import cv2" 2>/dev/null || packages+=(libgl1 libglib2.0-0)
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing ${packages[*]} (once; takes a minute)"
    {
        timeout 120 apt-get -qq update &&
            DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -qq install -y --no-install-recommends "${packages[@]}"
    } >/dev/null 2>&1 || echo "${packages[*]} could not be installed; tests that need them will be skipped" >&2
fi

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
"$PYTHON" -m pytest -n 2 "$@"
