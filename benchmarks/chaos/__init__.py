"""Breaks running stacks on purpose and looks whether what is promised stands.

plan.py says which faults come when, inflict.py does them, run.py is the run that suffers them, verdict.py judges it.
"""
