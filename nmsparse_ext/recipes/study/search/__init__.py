"""Do patterns chosen per layer pay? Uniform N:16, ERK, DominoSearch, allocation; equal fine-tuning."""
