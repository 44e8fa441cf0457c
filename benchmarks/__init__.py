"""Speed benchmarks, reported as ratios within one run; results/ has their saved output."""
