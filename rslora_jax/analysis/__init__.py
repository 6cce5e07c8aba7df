"""Analysis: gradient magnitude measured, not asserted."""
