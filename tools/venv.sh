#!/usr/bin/env bash
# Makes a virtual environment and installs this checkout into it, unless that has been done already.
#
#   tools/venv.sh DIR EXTRAS [PYTHON]      tools/venv.sh .venv test      tools/venv.sh .venv-tpu test,tpu python3.12
#
# EXTRAS may be empty (""). PYTHON defaults to python3 and only matters when DIR is made. What was installed is noted in
# DIR/.installed with a digest of setup.py, the folder and the Python version: when one of them changes, pip runs again.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$1 extras=$2 python=${3:-python3}

fail() {
    echo "install: $1" >&2
    exit 2
}

version_of() { # prints e.g. 3.11.7; fails when the interpreter is missing or does not run
    "$1" -c 'import platform; print(platform.python_version())' 2>/dev/null
}

check_new_enough() { # NAME VERSION ADVICE
    local major minor
    IFS=. read -r major minor _ <<<"$2"
    if ((major < 3 || (major == 3 && minor < 11))); then
        fail "$1 is Python $2, but 3.11 or newer is needed; $3"
    fi
}

if [ -e "$dir" ] && ! version_of "$dir/bin/python" >/dev/null; then
    [ -e "$dir/pyvenv.cfg" ] || fail "$dir exists and is not a virtual environment; choose another folder: make VENV=DIR"
    echo "install: the Python that made $dir is gone; making it anew"
    rm -rf "$dir"
fi

if [ -e "$dir" ]; then
    found=$(version_of "$dir/bin/python")
    check_new_enough "$dir" "$found" "remove it (rm -r $dir) and choose a newer one: make PYTHON=python3.12"
    if [ "${PYTHON_CHOSEN:-0}" = 1 ]; then # only an explicit choice can disagree with what is there
        wanted=$(version_of "$python") || fail "$python does not run; choose another: make PYTHON=/path/to/python3.12"
        [ "$wanted" = "$found" ] ||
            fail "$dir has Python $found, PYTHON=$python is $wanted; remove it (rm -r $dir) or keep both: make VENV=.venv-$wanted"
    fi
else
    found=$(version_of "$python") || fail "$python does not run; choose another: make PYTHON=/path/to/python3.12"
    check_new_enough "$python" "$found" "choose a newer one: make PYTHON=python3.12"
    "$python" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python has no venv module; install it (Debian, Ubuntu: apt install python${found%.*}-venv) or choose another: make PYTHON=..."
    "$python" -m venv "$dir"
fi

digest=$("$dir/bin/python" - <<'PY'
import hashlib, os, pathlib, sys
print(hashlib.sha256(f"{os.getcwd()} {sys.version}".encode() + pathlib.Path("setup.py").read_bytes()).hexdigest())
PY
)
note="$dir/.installed"
if [ -e "$note" ] && [ "$(head -n 1 "$note")" = "$digest" ]; then
    grep -qxF "extras:$extras" "$note" && exit 0
else
    printf '%s\n' "$digest" >"$note.new" # whatever an older setup.py or another folder left does not count
fi

start=$SECONDS
echo "install: .${extras:+[$extras]} into $dir (Python $found); this takes a few minutes the first time ..."
PIP_DISABLE_PIP_VERSION_CHECK=1 "$dir/bin/python" -m pip install -qq -e ".${extras:+[$extras]}" ||
    fail "pip could not install .${extras:+[$extras]} into $dir; its message is above"
if [ -e "$note.new" ]; then mv "$note.new" "$note"; fi
echo "extras:$extras" >>"$note"
echo "install: done in $((SECONDS - start)) s"
