# Sourced by the other scripts: activates a virtual environment with the packages of
# requirements.txt and requirements-dev.txt.
#
# It is made once, and made anew when one of these files or the version of Python changes. It lies
# outside the repository; ALPHADECAY_VENV sets another place. OLDEST=1 makes one with the oldest
# supported versions, beside it.

venv="${ALPHADECAY_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/alphadecay/venv}${OLDEST:+-oldest}"
base_python="${PYTHON:-python3}"
requirements=(requirements.txt requirements-dev.txt ${OLDEST:+requirements-oldest.txt})

"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: Python 3.10 or later is needed: set PYTHON, for instance PYTHON=python3.12" >&2
    exit 2
}
wanted=$("$base_python" - "${requirements[@]}" <<'PYTHON'
import hashlib, sys
content = b"".join(open(name, "rb").read() for name in sys.argv[1:])
print(sys.version.split()[0], hashlib.sha256(content).hexdigest())
PYTHON
)
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing ${requirements[*]} into $venv (once; about 6 GB, a few minutes)"
    "$base_python" -m venv --clear "$venv" || {
        echo "error: $base_python cannot make a virtual environment; on Debian and Ubuntu," \
            "apt install python3-venv" >&2
        exit 2
    }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        "${requirements[@]/#/--requirement=}"
    echo "$wanted" > "$venv/installed"
fi
export PATH="$venv/bin:$PATH"
