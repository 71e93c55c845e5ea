"""The simulated world: an event loop with virtual time, disks and networks that fail on purpose.

``loop`` is the clock and knows which node every callback belongs to; ``disk`` and ``net`` are the
ports of ``nbdmirror.ports`` held to the same contract suites as the real ones. Everything is drawn
from one root seed: the same seed gives the same run.
"""
