"""The plan of a study: architectures, budgets, sizes, the manifest."""
