"""Argument groups: a frozen dataclass for each subject, with its click options and the values that they describe.

group        what a group is, and commands made of groups
parsers      texts of options to values
model        MODEL, and its analysis
planning     what to cut, how much, and the tokens
calibration  calibration data and statistics
running      execution, and the workload of a latency
building     what a runtime target is built with
training     what a model is finetuned with
output       files that are written
"""
