"""What is minimised: log-probs at targets, SFT."""
