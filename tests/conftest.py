"""Settings for all tests."""

from hypothesis import settings

# A busy machine is no failure: property tests are bounded by their examples, not by time.
settings.register_profile("surgeon", deadline=None)
settings.load_profile("surgeon")
