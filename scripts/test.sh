#!/usr/bin/env bash
# Sets up everything and passes the tests: formatting, types, then pytest, two at a time. Arguments go to pytest; the
# first may choose other packages, for which pytest alone runs:
#   --lowest  the lowest version of everything that pyproject.toml declares
#   --newest  the newest of everything but torch
#   --bare    no extras: the core's tests
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
mkdir -p build
kind=test extras='[test]' constraints=scripts/constraints.txt warnings=()
case ${1:-} in
--lowest)
    kind=lowest constraints=build/lowest.txt
    "${DELTASPEC_PYTHON:-python3}" scripts/lowest.py >"$constraints"
    # What old packages warn of, beside younger ones or of files that they leave open, is not ours to mend.
    warnings=(-W ignore::DeprecationWarning -W ignore::FutureWarning -W ignore::PendingDeprecationWarning
        -W ignore::ResourceWarning)
    ;;
--newest)
    kind=newest constraints=build/newest.txt
    { date '+# %F' && grep '^torch==' scripts/constraints.txt; } >"$constraints" # made anew every day
    ;;
--bare) kind=bare extras='[check]' ;;
esac
[ "$kind" = test ] || shift
make_environment ".venv-$kind" "$extras" "$constraints"
bin=.venv-$kind/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MPLBACKEND=Agg HF_HUB_DISABLE_TELEMETRY=1 DELTASPEC_EXTRAS=$kind
if [ $# -eq 0 ]; then
    if [ "$kind" = test ]; then
        "$bin/ruff" check .
        "$bin/ruff" format --check .
        "$bin/mypy"
    fi
    set -- -n 2 --dist loadfile
fi
exec "$bin/python" -m pytest ${warnings[@]+"${warnings[@]}"} "$@"
