# Sourced by demo.sh and test.sh: makes the virtual environment $1 with deltaspec and extras $2, once.
# DELTASPEC_PYTHON chooses the interpreter (3.11 or newer).
make_environment() {
    local folder=$1 extras=$2 python=${DELTASPEC_PYTHON:-}
    if [ -z "$python" ]; then
        for python in python3 python3.13 python3.12 python3.11; do
            "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
        done
    fi
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "deltaspec needs Python 3.11 or newer: install it, or name it in DELTASPEC_PYTHON." >&2
        return 1
    }
    local stamp=$folder/.deltaspec-installed wanted
    wanted=$(cat pyproject.toml scripts/constraints.txt | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        echo "Making $folder (about two minutes) …" >&2
        "$python" -m venv "$folder"
        "$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".$extras"
        echo "$wanted" >"$stamp"
    fi
}
