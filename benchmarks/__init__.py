"""Speed, measured as ratios within one run; results/ keeps what the commands wrote."""
