"""The parts of a run that Ray places, and their plain counterparts for one process."""
