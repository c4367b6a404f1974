"""Settings for all tests."""

import os

from hypothesis import settings

# Kernels run in Triton's interpreter here, which must be known before the first of them is defined.
os.environ["TRITON_INTERPRET"] = "1"

# A busy machine is no failure: property tests are bounded by their examples, not by time.
settings.register_profile("surgeon", deadline=None)
settings.load_profile("surgeon")
