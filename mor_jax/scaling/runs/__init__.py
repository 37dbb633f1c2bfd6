"""The runs of a study: commands, local and cluster execution, results."""
