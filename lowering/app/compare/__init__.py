"""Several recipes or artefacts beside each other, over calibration seeds."""
