"""What is fitted on the calibration split so that a finding can be believed: probabilities, sets, thresholds."""
