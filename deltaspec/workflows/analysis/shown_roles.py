"""Records as tables and figures list them: where a model has very many unknown roles, the rare ones together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from deltaspec.architecture.roles import group_rare
from deltaspec.types import MatrixRecord


def with_shown_roles(groups: Sequence[Sequence[MatrixRecord]]) -> list[list[MatrixRecord]]:
    """Return records under the roles that ``group_rare`` gives them, counted over all groups.

    Parameters
    ----------
    groups : sequence of sequences of MatrixRecord
        Of one run, or of each step of a training.
    """
    shown = group_rare(Counter(record.key.role for records in groups for record in records))
    if all(role == listed for role, listed in shown.items()):
        return [list(records) for records in groups]
    return [[replace(r, key=replace(r.key, role=shown[r.key.role])) for r in records] for records in groups]
