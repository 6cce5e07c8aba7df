"""Laws: what the theory says of magnitudes and ranks, as numbers to compare with."""
