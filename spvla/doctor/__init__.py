"""Does the acceleration do what it says, on this robot's own observations? ``python -m spvla.doctor``."""

from spvla.doctor.checks import examine
from spvla.doctor.findings import Finding, Report, Sample

__all__ = ["Finding", "Report", "Sample", "examine"]
