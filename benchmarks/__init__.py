"""What we measure, always as a ratio against a peer in the same run; results/ has what we found."""
