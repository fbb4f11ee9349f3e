"""``python -m spvla.doctor``: the same as ``spvla doctor``."""

import sys

from spvla.cli import run
from spvla.doctor.command import doctor

if __name__ == "__main__":
    sys.exit(run(doctor, "Check an accelerated policy on recorded observations."))
