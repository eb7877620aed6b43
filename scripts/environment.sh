# Sourced by demo.sh and test.sh: makes the virtual environment $1 with deltaspec and extras $2 under constraints $3.
# DELTASPEC_PYTHON chooses the interpreter (3.11 or newer). Made anew when declarations, constraints, or Python change.
make_environment() {
    local folder=$1 extras=$2 constraints=$3 python=${DELTASPEC_PYTHON:-}
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
    wanted=$({ cat pyproject.toml "$constraints"; echo "$extras"; "$python" -c 'import sys; print(sys.version)'; } | cksum)
    if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && "$folder/bin/python" -c 'import deltaspec' 2>/dev/null; then
        return
    fi
    echo "Making $folder (about two minutes) …" >&2
    rm -rf "$folder" # half made, or of other versions
    "$python" -m venv "$folder"
    local install=("$folder/bin/python" -m pip install --quiet --disable-pip-version-check -c "$constraints")
    "${install[@]}" --upgrade setuptools # builds deltaspec, in the version that the constraints say
    "${install[@]}" --no-build-isolation -e ".$extras"
    echo "$wanted" >"$stamp"
}
