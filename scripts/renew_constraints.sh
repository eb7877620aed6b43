#!/usr/bin/env bash
# Renews scripts/constraints.txt: the newest of everything that demo and tests install, for every Python that is
# supported, and torch as it is pinned there. uv does it, in an environment of its own.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${DELTASPEC_PYTHON:-python3} uv=.venv-uv/bin/uv file=scripts/constraints.txt
[ -x "$uv" ] || { "$python" -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet -c "$file" uv; }
mkdir -p build
grep '^torch==' "$file" >build/torch.txt
printf 'setuptools\nuv\n' >build/tools.txt
{
    echo "# Made by scripts/renew_constraints.sh, for Python 3.11 and newer; torch's version is chosen by hand."
    "$uv" pip compile --quiet --universal --python-version 3.11 --all-extras --upgrade --no-header --no-annotate \
        --no-emit-index-url --no-emit-find-links --constraint build/torch.txt pyproject.toml build/tools.txt
} >build/constraints.txt
mv build/constraints.txt "$file"
