"""Fuzzing of everything that reads what others wrote: wire, disk, configuration, admin socket.

``targets`` are functions over bytes that must come to an end with nothing but the errors that
their parser documents. ``test_fuzz`` runs them for a few seconds each on seeds and on what
hypothesis makes of them, as part of every test run; ``python -m tests.fuzz`` runs campaigns,
guided by coverage where atheris is installed (``pip install -e '.[fuzz]'``).
"""
