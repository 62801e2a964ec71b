"""From run directories to tables, comparisons, plots and the report of a study. Reads files; computes nothing heavy."""
