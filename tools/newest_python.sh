#!/usr/bin/env bash
# Prints the path of the newest Python on this machine that is 3.12 or later and can make a virtual environment; fails if there is none.
# A name on PATH may be a shim that does not run, so every candidate is asked for its version.
set -euo pipefail
shopt -s nullglob
for minor in 14 13 12; do
    for candidate in "$(command -v "python3.$minor" || true)" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"python3.$minor" \
        "$HOME"/.local/share/uv/python/*/bin/"python3.$minor" /opt/*/bin/"python3.$minor" /usr/local/bin/"python3.$minor"; do
        if [ -n "$candidate" ] && "$candidate" -c "import ensurepip, sys, venv; sys.exit(sys.version_info[:2] != (3, $minor))" 2>/dev/null; then
            echo "$candidate"
            exit 0
        fi
    done
done
exit 1
