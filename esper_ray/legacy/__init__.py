"""Import of what came before this format: Phase 1 tables and `.pt` records, read as hostile."""
