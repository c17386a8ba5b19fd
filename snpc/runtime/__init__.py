"""What runs models or reads and writes files: calibration, statistics, closed forms, sensitivity, evaluation."""
