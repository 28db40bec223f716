"""Made-up event streams: test data for the views."""
from sftkit.events import made_up_run
