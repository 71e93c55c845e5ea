"""What is played for mutants of which drawn runs see nothing: a module for each subject.

Each play is one sequence of events that drawn runs come by once in millions of seeds: somebody acts
upon what another has changed, or is about to, while that one waits for a disk; or one fault comes
in the middle of what another one has begun. Each step is right by itself. How a play is run:
``tests.sim.directed``; what several of them need is in ``stage``.
"""
