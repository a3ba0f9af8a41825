"""Search beside recommendation: what a query means, which items match it, in which order."""
