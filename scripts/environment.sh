# Sourced by the other scripts: a virtual environment with requirements.txt and requirements-dev.txt, made once and made
# anew only when one of these files or the Python version changes. It lives outside the repository; ALPHADECAY_VENV puts it elsewhere.

venv="${ALPHADECAY_VENV:-${XDG_CACHE_HOME:-$HOME/.cache}/alphadecay/venv}"
base_python="${PYTHON:-python3}"

"$base_python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "error: Python 3.10 or later is needed; set PYTHON to one, e.g. PYTHON=python3.12" >&2; exit 2; }
wanted=$("$base_python" -c 'import hashlib, sys; print(sys.version.split()[0], hashlib.sha256(b"".join(open(name, "rb").read() for name in ("requirements.txt", "requirements-dev.txt"))).hexdigest())')
if [ "$(cat "$venv/installed" 2>/dev/null)" != "$wanted" ]; then
    echo "Installing requirements.txt into $venv (once; about 6 GB, a few minutes)"
    "$base_python" -m venv --clear "$venv" ||
        { echo "error: no virtual environment could be made; on Debian or Ubuntu: apt install python3-venv" >&2; exit 2; }
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
    echo "$wanted" > "$venv/installed"
fi
export PATH="$venv/bin:$PATH"
