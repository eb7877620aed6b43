#!/usr/bin/env bash
# Sets up everything and passes the tests: formatting, types, then pytest, two at a time. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv-test '[test]'
bin=.venv-test/bin
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} MPLBACKEND=Agg HF_HUB_DISABLE_TELEMETRY=1
if [ $# -eq 0 ]; then
    "$bin/ruff" check .
    "$bin/ruff" format --check .
    "$bin/mypy"
    set -- -n 2 --dist loadfile
fi
exec "$bin/python" -m pytest "$@"
