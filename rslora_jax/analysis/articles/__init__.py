"""Articles: the popular simulation of style and facts, reproduced and corrected."""
