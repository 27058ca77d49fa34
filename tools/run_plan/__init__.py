"""The arithmetic behind `plan_run.py`: what a run takes on a cluster that need not be there. No torch."""
