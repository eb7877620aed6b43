#!/usr/bin/env bash
# Makes the figures that the project keeps in figures/: those of the demo's pair, and with --experiment also those of
# scripts/reproduce_learning_forgetting.py (some 40 minutes). Another machine may change their last digits.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
if [ "${1:-}" = --experiment ]; then
    make_environment .venv '[train]' scripts/constraints.txt
    .venv/bin/python scripts/reproduce_learning_forgetting.py
else
    make_environment .venv '' scripts/constraints.txt
    eval "$(.venv/bin/python scripts/headline_pair.py)"
    .venv/bin/deltaspec analyze "$BASE" "$TUNED" -o runs/demo
    .venv/bin/deltaspec plot runs/demo -o figures
fi
