#!/usr/bin/env bash
# Sets up everything and does the main job on a real pair: MiniLM-L6 and its fine-tune on SRE text (91 MB each).
# Everything it makes lies under runs/, which git ignores.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment .venv '' scripts/constraints.txt
eval "$(.venv/bin/python scripts/headline_pair.py)"
.venv/bin/deltaspec analyze "$BASE" "$TUNED" -o runs/demo
.venv/bin/deltaspec plot runs/demo -o runs/demo/figures
.venv/bin/deltaspec extract "$BASE" "$TUNED" --rank 16 -o runs/demo-adapter --overwrite
.venv/bin/deltaspec verify "$BASE" "$TUNED" runs/demo-adapter
