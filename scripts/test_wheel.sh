#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into an environment with nothing else in it, and uses it outside of the
# source tree. The environment (.venv-wheel) is kept until dependencies change: the first time takes two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${DELTASPEC_PYTHON:-.venv-test/bin/python} # of the tests, which scripts/test.sh made
root=$PWD work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
pip=(-m pip --quiet --disable-pip-version-check)

# A copy of what git tracks: a build must not depend on files that happen to lie about, nor leave any.
mkdir "$work/source"
git ls-files -z | tar --null --files-from - -cf - | tar -xf - -C "$work/source"

wanted=$(sed -n '/^requires-python/p; /^dependencies/,/^]/p' pyproject.toml | cat - scripts/constraints.txt | cksum)
if [ "$(cat .venv-wheel/.deltaspec-installed 2>/dev/null)" != "$wanted" ]; then
    rm -rf .venv-wheel .venv-build
fi
if [ ! -x .venv-build/bin/python ]; then
    "$python" -m venv .venv-build
    .venv-build/bin/python "${pip[@]}" install -c scripts/constraints.txt build
fi
.venv-build/bin/python -m build --outdir "$work/dist" "$work/source" >"$work/build.log" 2>&1 || {
    cat "$work/build.log" >&2
    exit 1
}

[ -x .venv-wheel/bin/python ] || "$python" -m venv .venv-wheel
wheel=("$work"/dist/deltaspec-*.whl) sdist=("$work"/dist/deltaspec-*.tar.gz)
.venv-wheel/bin/python "${pip[@]}" uninstall --yes deltaspec 2>/dev/null || true
.venv-wheel/bin/python "${pip[@]}" install -c scripts/constraints.txt "${wheel[0]}"
echo "$wanted" >.venv-wheel/.deltaspec-installed
cp scripts/use_wheel.py "$work"
cd "$work"
"$root/.venv-wheel/bin/python" -I use_wheel.py "${wheel[0]}" "${sdist[0]}" "$root/pyproject.toml"
