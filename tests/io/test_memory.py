"""Memory does not grow with the number of matrices read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.io.files import write_checkpoint

SCRIPT = """
import resource, sys
from deltaspec.io.matrix import open_matrix
from deltaspec.io.open import open_plain
from deltaspec.types import MatrixSource, View
source = open_plain(sys.argv[1])
def read(spec):
    return open_matrix(MatrixSource(spec, View(spec.shape))).rows(0, spec.shape[0]).sum().item()
specs = list(source.tensors.values())
read(specs[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for spec in specs:
    read(spec)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("layout", ["single", "sharded", "pickled"])
def test_reading_many_matrices_keeps_none(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, {f"layers.{n}.weight": torch.ones(1024, 1024) for n in range(24)}, layout)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert int(done.stdout) < 12 * 1024  # KB: three of the 24 matrices of 4 MB
