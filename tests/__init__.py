"""The tests of snpc: a folder for each package, models to test on, and rules of the whole in policy."""
