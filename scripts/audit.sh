#!/usr/bin/env bash
# Report known vulnerabilities of the packages in .venv, with pip-audit (https://pypi.org/project/pip-audit).
# Always exits with code 0, after two minutes at most.
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
LIMIT=${AUDIT_SECONDS:-120}
begun=$SECONDS
left() { echo $((LIMIT - (SECONDS - begun) > 1 ? LIMIT - (SECONDS - begun) : 1)); }

echo "== dependency audit (a report, not a test)"
AUDIT=.venv/audit # a separate environment, so that pip-audit's own packages are not audited
if ! "$AUDIT/bin/python" -m pip_audit --version >/dev/null 2>&1; then
    "$PYTHON" -m venv "$AUDIT" >/dev/null 2>&1 &&
        timeout "$(left)" "$AUDIT/bin/python" -m pip install --quiet --disable-pip-version-check pip-audit >/dev/null 2>&1 || {
        echo "not audited: pip-audit could not be installed (no network, or no such package at this index)"
        exit 0
    }
fi

packages=$("$PYTHON" -c 'import site; print(site.getsitepackages()[0])')
found=$(timeout "$(left)" "$AUDIT/bin/python" -m pip_audit --path "$packages" --progress-spinner off 2>&1)
code=$?
missed=$(grep -c "could not be audited" <<<"$found")
case $code in
0) [ "$missed" -eq 0 ] && echo "no known vulnerabilities in .venv" ||
    echo "$missed packages not audited, unknown to the service (is the index a mirror of PyPI?); no known vulnerabilities in the others" ;;
1) if grep -q "^Found" <<<"$found"; then
    echo "known vulnerabilities; newer versions may fix them:"
    echo "$found" | tail -n 60
else
    echo "not audited: the vulnerability service could not be reached ($(echo "$found" | tail -n 1 | cut -c 1-200))"
fi ;;
124) echo "not audited: no answer from the vulnerability service within $LIMIT seconds" ;;
*) echo "not audited: $(echo "$found" | tail -n 1 | cut -c 1-200)" ;;
esac
exit 0
