"""The row of a training that has no ΔW."""

from deltaspec.store.formats.comparison import ChangeSummary

NOTHING = ChangeSummary(
    changed=None,
    relative_norm=None,
    effective_rank=None,
    rank_90=None,
    overlap=None,
    overlap_null=None,
    overlap_with=None,
    amplification=None,
    amplification_null=None,
    intruders=None,
    intruders_null=None,
    intruder_energy=None,
)
